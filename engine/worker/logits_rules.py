"""Rules about single tokens that few requests bring: allowed ids, bad words, minimum length, bias."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.sampling_params import SamplingParams
from engine.worker.input_batch import InputBatch, Slot

_Ints = npt.NDArray[np.int64]
_EMPTY = np.zeros(0, np.int64)


@dataclass(slots=True)
class _Rules:
    allowed: _Ints | None = None
    biased: _Ints = field(default_factory=lambda: _EMPTY)
    biases: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    ends: _Ints = field(default_factory=lambda: _EMPTY)
    """Ids that may not come before `min_tokens`."""
    min_tokens: int = 0
    bad_words: list[list[int]] = field(default_factory=list)
    last_resort: int = 0
    """The token taken where the rules leave none: one that ends the answer, if the model has one."""


class TokenRules:
    """Applies the rules of the rows that have any; the loop is over those rows only."""

    def __init__(self, batch: InputBatch, vocab_size: int) -> None:
        self._batch = batch
        self._vocab_size = vocab_size
        self._by_slot: dict[int, _Rules] = {}

    def add(self, slot: Slot) -> bool:
        """Take over a request's rules; returns whether it has any."""
        params = slot.request.params
        ends = (
            set(params.stop_token_ids) if params.ignore_eos else {*params.stop_token_ids, *slot.request.eos_token_ids}
        )
        if not _has_rules(params):
            return False
        bias = params.logit_bias or {}
        self._by_slot[slot.index] = _Rules(
            allowed=None if params.allowed_token_ids is None else np.array(params.allowed_token_ids, np.int64),
            biased=np.array(list(bias), np.int64),
            biases=np.array(list(bias.values()), np.float32),
            ends=np.array([token for token in ends if token < self._vocab_size], np.int64),
            min_tokens=params.min_tokens,
            bad_words=[word for word in params.bad_words_token_ids if word],
            last_resort=next(iter(slot.request.eos_token_ids), 0),
        )
        return True

    def remove(self, index: int) -> None:
        """Forget a slot's rules."""
        self._by_slot.pop(index, None)

    def apply(self, logits: Tensor, rows: _Ints, slots: _Ints, positions: _Ints, num_outputs: _Ints) -> None:
        """Change the logits (S, vocabulary) of `rows` in place; the other arrays are (S)."""
        allowed, banned, biased, biases, words = [], [], [], [], []
        for row in rows.tolist():
            rules = self._by_slot[int(slots[row])]
            if rules.allowed is not None:
                allowed.append((row, rules.allowed))
            if num_outputs[row] < rules.min_tokens:
                banned.append((row, rules.ends))
            biased.append((row, rules.biased))
            biases.append(rules.biases)
            words += [(row, word) for word in rules.bad_words if len(word) <= num_outputs[row] + 1]
        if allowed:
            where = self._indices(allowed)
            kept = logits[where]
            logits[self._batch.upload(np.array([row for row, _ in allowed]))] = float("-inf")
            logits[where] = kept
        if words:
            self._ban_words(logits, words, slots, positions)
        if banned:
            logits[self._indices(banned)] = float("-inf")
        if sum(len(bias) for bias in biases):
            where = self._indices(biased)
            logits[where] += self._batch.upload(np.concatenate(biases))
        self._leave_one(logits, rows, slots)

    def _ban_words(self, logits: Tensor, words: list[tuple[int, list[int]]], slots: _Ints, positions: _Ints) -> None:
        """Ban the last token of each word whose other tokens are the newest output. The newest may not be known to
        the host yet, so they are compared on the device.
        """
        longest = max(len(word) for _, word in words) - 1
        beginnings = np.full((len(words), longest), -1, np.int64)
        for i, (_, word) in enumerate(words):
            beginnings[i, longest - (len(word) - 1) :] = word[:-1]
        rows = np.array([row for row, _ in words], np.int64)
        where = positions[rows][:, None] - longest + np.arange(longest)
        newest = self._batch.token_table[
            self._batch.upload(slots[rows]).unsqueeze(1), self._batch.upload(np.maximum(where, 0))
        ]
        wanted = self._batch.upload(beginnings)
        matches = ((newest == wanted) | (wanted < 0)).all(-1)
        ban = torch.where(matches, float("-inf"), 0.0)
        last = self._batch.upload(np.array([word[-1] for _, word in words], np.int64))
        logits.index_put_((self._batch.upload(rows), last), ban, accumulate=True)

    def _leave_one(self, logits: Tensor, rows: _Ints, slots: _Ints) -> None:
        """Where every token is forbidden, end the answer."""
        where = self._batch.upload(rows)
        tokens = self._batch.upload(np.array([self._by_slot[int(slot)].last_resort for slot in slots[rows]], np.int64))
        kept = logits[where, tokens]
        hopeless = logits[where].amax(-1) == float("-inf")
        logits[where, tokens] = torch.where(hopeless, torch.zeros_like(kept), kept)

    def _indices(self, pairs: list[tuple[int, _Ints]]) -> tuple[Tensor, Tensor]:
        rows = np.concatenate([np.full(len(ids), row, np.int64) for row, ids in pairs])
        return self._batch.upload(rows), self._batch.upload(np.concatenate([ids for _, ids in pairs]))


def _has_rules(params: SamplingParams) -> bool:
    return bool(
        params.allowed_token_ids is not None or params.logit_bias or params.min_tokens or params.bad_words_token_ids
    )
