"""Rules about single tokens that few requests bring: allowed ids, bad words, minimum length, bias."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.worker.input_batch import InputBatch, Slot

_Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _BadWords:
    """`W` words on the device. The newest tokens may not be known to the host, so that they are compared there."""

    beginnings: Tensor
    """(W, longest - 1) int32: all tokens but the last, on the right; -1 before them."""
    last: Tensor
    """(W) int64."""
    lengths: Tensor
    """(W) int64."""


@dataclass(slots=True)
class _Rules:
    allowed: _Ints | None
    biased: _Ints
    biases: npt.NDArray[np.float32]
    ends: _Ints
    """Ids that may not come before `min_tokens`."""
    min_tokens: int
    bad_words: _BadWords | None
    last_resort: int
    """The token taken where the rules leave none: one that ends the answer, if the model has one."""


class TokenRules:
    """Applies the rules of the rows that have any; the loop is over those rows only."""

    def __init__(self, batch: InputBatch, vocab_size: int) -> None:
        self._batch = batch
        self._vocab_size = vocab_size
        self._by_slot: dict[int, _Rules] = {}
        # On the device: a number from the host would be copied there by a call that waits for all work before it.
        self._never = torch.tensor(float("-inf"), device=batch.device)

    def add(self, slot: Slot) -> bool:
        """Take over a request's rules; returns whether it has any."""
        request, params = slot.request, slot.request.params
        bias = params.logit_bias or {}
        known_eos = [token for token in request.eos_token_ids if 0 <= token < self._vocab_size]
        ends = {*params.stop_token_ids, *([] if params.ignore_eos else known_eos)} if params.min_tokens else set()
        if not (bias or params.allowed_token_ids or ends or request.bad_words):
            return False
        self._by_slot[slot.index] = _Rules(
            allowed=None if params.allowed_token_ids is None else np.array(params.allowed_token_ids, np.int64),
            biased=np.array(list(bias), np.int64),
            biases=np.array(list(bias.values()), np.float32),
            ends=np.array(sorted(ends), np.int64),
            min_tokens=params.min_tokens,
            bad_words=self._bad_words(request.bad_words) if request.bad_words else None,
            last_resort=next(iter(known_eos), 0),
        )
        return True

    def remove(self, index: int) -> None:
        """Forget a slot's rules."""
        self._by_slot.pop(index, None)

    def apply(self, logits: Tensor, rows: _Ints, slots: _Ints, positions: _Ints, num_outputs: _Ints) -> None:
        """Change the logits (S, vocabulary) of `rows` in place; the other arrays are (S)."""
        allowed, banned, biased, biases = [], [], [], []
        for row in rows.tolist():
            rules = self._by_slot[int(slots[row])]
            if rules.allowed is not None:
                allowed.append((row, rules.allowed))
            if num_outputs[row] < rules.min_tokens:
                banned.append((row, rules.ends))
            biased.append((row, rules.biased))
            biases.append(rules.biases)
        if allowed:
            where = self._indices(allowed)
            kept = logits[where]
            logits.index_fill_(0, self._batch.upload(np.array([row for row, _ in allowed])), float("-inf"))
            logits[where] = kept
        for row in rows.tolist():
            words = self._by_slot[int(slots[row])].bad_words
            if words is not None:
                self._ban_words(logits[row], words, int(slots[row]), int(positions[row]), int(num_outputs[row]))
        if banned:
            logits.index_put_(self._indices(banned), self._never)
        if sum(len(bias) for bias in biases):
            where = self._indices(biased)
            logits[where] += self._batch.upload(np.concatenate(biases))
        self._leave_one(logits, rows, slots)

    def _bad_words(self, words: list[list[int]]) -> _BadWords:
        longest = max(map(len, words)) - 1
        beginnings = np.full((len(words), longest), -1, np.int32)
        for i, word in enumerate(words):
            beginnings[i, longest - len(word) + 1 :] = word[:-1]
        last = np.array([word[-1] for word in words], np.int64)
        lengths = np.array([len(word) for word in words], np.int64)
        return _BadWords(*(self._batch.upload(array) for array in (beginnings, last, lengths)))

    def _ban_words(self, logits: Tensor, words: _BadWords, slot: int, position: int, num_outputs: int) -> None:
        """Ban the last token of each word whose other tokens are the newest output; logits are one row's."""
        longest = words.beginnings.shape[1]
        tokens = self._batch.token_table[slot]
        # What lies before the sequence matches nothing but the padding of shorter words.
        known = min(longest, position)
        newest, beginnings = tokens[position - known : position], words.beginnings[:, longest - known :]
        matches = ((newest == beginnings) | (beginnings < 0)).all(-1) & (words.lengths <= num_outputs + 1)
        ban = torch.where(matches, float("-inf"), 0.0)
        logits.index_put_((words.last,), ban, accumulate=True)

    def _leave_one(self, logits: Tensor, rows: _Ints, slots: _Ints) -> None:
        """Where every token is forbidden, take one that ends the answer, not just any."""
        where = self._batch.upload(rows)
        tokens = self._batch.upload(np.array([self._by_slot[int(slot)].last_resort for slot in slots[rows]], np.int64))
        kept = logits[where, tokens]
        hopeless = logits[where].amax(-1) == float("-inf")
        logits[where, tokens] = torch.where(hopeless, torch.zeros_like(kept), kept)

    def _indices(self, pairs: list[tuple[int, _Ints]]) -> tuple[Tensor, Tensor]:
        rows = np.concatenate([np.full(len(ids), row, np.int64) for row, ids in pairs])
        return self._batch.upload(rows), self._batch.upload(np.concatenate([ids for _, ids in pairs]))
