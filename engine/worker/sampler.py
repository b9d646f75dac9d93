"""From logits to token ids, for a whole batch at once."""

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLMatcher
from torch import Tensor

from engine.sampling_params import SamplingParams
from engine.worker.grammar_masks import SOME_ROWS, GrammarMasks
from engine.worker.input_batch import InputBatch, Slot
from engine.worker.logits_rules import TokenRules
from engine.worker.pending import Logprobs
from engine.worker.random_noise import gumbel_noise, noise_keys

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]


class Sampler:
    """Keeps each slot's parameters in arrays, so that a step gathers them without asking each request.

    Order: token rules (allowed ids, bad words, minimum length, bias), penalties, grammars, temperature, min_p, top_k,
    top_p. Greedy rows stop after the grammars.
    """

    def __init__(self, batch: InputBatch, num_slots: int, vocab_size: int, grammars: GrammarMasks) -> None:
        self._batch = batch
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._rules = TokenRules(batch, vocab_size)
        self._greedy = np.ones(num_slots, bool)
        self._temperature, self._top_p, self._min_p = (np.zeros(num_slots, np.float32) for _ in range(3))
        self._top_k, self._seeds, self._logprobs = (np.zeros(num_slots, np.int64) for _ in range(3))
        self._penalties = np.zeros((num_slots, 3), np.float32)
        self._penalized, self._ruled, self._formed = (np.zeros(num_slots, bool) for _ in range(3))
        # Made when the first request asks for a penalty.
        self._in_prompt: Tensor | None = None
        self._output_counts: Tensor | None = None

    def add(self, slot: Slot, token_ids: list[int], matcher: LLMatcher | None = None) -> None:
        """Take over the parameters of a request that starts with these tokens, prompt and earlier output.

        `matcher` is of what its answer must look like.
        """
        i, params = slot.index, slot.request.params
        self._greedy[i] = params.is_greedy
        self._temperature[i], self._top_p[i], self._min_p[i] = params.temperature, params.top_p, params.min_p
        self._top_k[i] = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        self._seeds[i] = slot.request.seed
        self._logprobs[i] = -1 if params.logprobs is None else params.logprobs
        self._penalties[i] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self._penalized[i] = has_penalty(params)
        self._ruled[i] = self._rules.add(slot)
        self._formed[i] = self._grammars.add(slot, token_ids, matcher)
        if self._penalized[i]:
            self._start_counts(i, token_ids, len(slot.request.prompt_token_ids))

    def remove(self, index: int) -> None:
        """Forget a slot's rules."""
        self._rules.remove(index)
        self._grammars.remove(index)

    def logprobs_wanted(self, slots: _Ints) -> _Ints:
        """(rows) How many log probabilities each row wants; -1 for none."""
        return self._logprobs[slots]

    def is_plain(self, slots: _Ints) -> bool:
        """Whether these rows take the likeliest token, no questions asked."""
        special = self._ruled | self._formed | self._penalized | ~self._greedy | (self._logprobs >= 0)
        return not special[slots].any()

    def sample(self, logits: Tensor, slots: _Ints, positions: _Ints, num_outputs: _Ints) -> Tensor:
        """Choose a token for each row.

        Args:
            logits: (rows, vocabulary) float32; changed in place.
            slots: (rows) whose parameters to use.
            positions: (rows) index that the new token will have in its sequence.
            num_outputs: (rows) tokens generated before it.

        Returns:
            (rows) int64 token ids, on the device.
        """
        ruled = np.flatnonzero(self._ruled[slots])
        if len(ruled):
            self._rules.apply(logits, ruled, slots, positions, num_outputs)
        penalized = np.flatnonzero(self._penalized[slots])
        for first in range(0, len(penalized), SOME_ROWS):
            self._penalize(logits, penalized[first : first + SOME_ROWS], slots)
        self._grammars.apply(logits, slots)
        tokens = logits.argmax(-1)
        random = np.flatnonzero(~self._greedy[slots])
        for first in range(0, len(random), SOME_ROWS):
            some = random[first : first + SOME_ROWS]
            rows = self._batch.upload(some)
            tokens[rows] = self._sample_randomly(logits[rows], slots[some], positions[some])
        if len(penalized):
            self._count(tokens, penalized, slots)
        return tokens

    def _sample_randomly(self, logits: Tensor, slots: _Ints, positions: _Ints) -> Tensor:
        logits /= self._column(self._temperature[slots])
        if (self._min_p[slots] > 0).any():
            floor = np.log(np.maximum(self._min_p[slots], np.finfo(np.float32).tiny))
            lowest = logits.amax(-1, keepdim=True) + self._column(floor)
            logits.masked_fill_(logits < lowest, float("-inf"))
        top_k, top_p = self._top_k[slots], self._top_p[slots]
        limited = np.flatnonzero((top_k < self._vocab_size) | (top_p < 1))
        if len(limited):
            rows = self._batch.upload(limited)
            ks = self._batch.upload(top_k[limited]).unsqueeze(1)
            logits[rows] = keep_top(logits[rows], ks, self._column(top_p[limited]))
        keys = self._batch.upload(noise_keys(self._seeds[slots], positions))
        return (logits + gumbel_noise(keys, logits.shape[1])).argmax(-1)

    def _penalize(self, logits: Tensor, rows: _Ints, slots: _Ints) -> None:
        assert self._in_prompt is not None and self._output_counts is not None
        where, of = self._batch.upload(rows), self._batch.upload(slots[rows])
        penalties = [self._column(c) for c in self._penalties[slots[rows]].T]
        logits[where] = penalize(logits[where], self._in_prompt[of], self._output_counts[of], *penalties)

    def _count(self, tokens: Tensor, rows: _Ints, slots: _Ints) -> None:
        assert self._output_counts is not None
        where, of = self._batch.upload(rows), self._batch.upload(slots[rows])
        one = torch.ones(1, dtype=self._output_counts.dtype, device=tokens.device)
        self._output_counts.index_put_((of, tokens[where]), one, accumulate=True)

    def _start_counts(self, index: int, token_ids: list[int], num_prompt: int) -> None:
        if self._in_prompt is None or self._output_counts is None:
            shape, device = (len(self._greedy), self._vocab_size), self._batch.device
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=device)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=device)
        prompt, output = (np.array(ids, np.int64) for ids in (token_ids[:num_prompt], token_ids[num_prompt:]))
        mask = np.zeros(self._vocab_size, bool)
        mask[prompt] = True
        counts = np.bincount(output, minlength=self._vocab_size).astype(np.int32)
        self._in_prompt[index] = self._batch.upload(mask)
        self._output_counts[index] = self._batch.upload(counts)

    def _column(self, values: _Floats) -> Tensor:
        return self._batch.upload(values.astype(np.float32)).unsqueeze(1)


def penalize(
    logits: Tensor, in_prompt: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Logits (rows, vocabulary) less the penalties (rows, 1) of what the prompt has or was generated `counts` times."""
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | (counts > 0), repeated, logits)
    return logits - frequency * counts - presence * (counts > 0)


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set all but the likeliest to -inf: the first `top_k` (rows, 1), and of those the fewest whose probabilities sum
    to `top_p` (rows, 1) or more.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    ordered.masked_fill_(rank >= top_k, float("-inf"))
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    ordered.masked_fill_((before >= top_p) & (rank > 0), float("-inf"))
    return torch.empty_like(logits).scatter_(1, ids, ordered)


def gather_logprobs(logits: Tensor, taken: Tensor, count: int) -> Logprobs:
    """Log probabilities of the taken tokens (rows) and of the `count` best, from raw logits (rows, vocabulary)."""
    pairs = zip(logits.split(SOME_ROWS), taken.split(SOME_ROWS), strict=True)
    parts = [_gather_logprobs(some, tokens, count) for some, tokens in pairs]
    return Logprobs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _gather_logprobs(logits: Tensor, taken: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    of_taken = logprobs.gather(1, taken.unsqueeze(1))
    rank = (logprobs > of_taken).sum(-1) + 1
    # A stable sort has the lower id first among equals, as the choice of greedy tokens has.
    values, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    return of_taken.squeeze(1), rank, values[:, :count].contiguous(), ids[:, :count].contiguous()


def profile_sampling(logits: Tensor) -> None:
    """Run what takes the most memory beside the logits (rows, vocabulary)."""
    rows = min(len(logits), SOME_ROWS)
    indices = torch.arange(rows, device=logits.device)
    raw = logits.clone()  # kept for the log probabilities while the logits are changed
    gather_logprobs(raw, torch.zeros(len(logits), dtype=torch.int64, device=logits.device), 1)
    penalize(
        logits[:rows].clone(), logits[:rows] > 0, logits[:rows].int(), *torch.ones(3, rows, 1, device=logits.device)
    )
    keep_top(logits[:rows], indices.unsqueeze(1) + 1, torch.ones(rows, 1, device=logits.device))
    gumbel_noise(indices, logits.shape[1])


def has_penalty(params: SamplingParams) -> bool:
    """Whether any penalty changes logits."""
    return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)
