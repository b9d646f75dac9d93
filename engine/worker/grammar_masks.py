"""Which tokens may come next in answers that must have a certain form."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLMatcher
from torch import Tensor

from engine.worker.input_batch import InputBatch, Slot
from engine.worker.pending import PendingStep

SOME_ROWS = 64
"""Of logits, that are changed at once: more would take memory from the cache."""
_SECONDS = 0.25
_SECONDS_A_TOKEN = 0.005
"""A usual grammar takes 0.01 to 0.1 ms a token, all of JSON as GBNF 0.7 ms."""
_SECONDS_OF_ALL = 0.5
_SECONDS_OF_ALL_A_STEP = 0.05
"""For all answers together: beyond it the dearest are given up, but for those that are cheap by themselves."""
_CHEAP_SECONDS = 0.002
_TOO_COMPLEX = "structured_outputs: the grammar became too complex"
_Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Answer:
    """How far an answer has come."""

    request_id: str
    matcher: LLMatcher
    eos_token_ids: frozenset[int]
    in_flight: tuple[PendingStep, int] | None = None
    """The launched step that brings the newest token, and its place there."""
    has_ended: bool = False
    seconds_left: float = _SECONDS
    """That its grammar may still take: all others' tokens wait for it."""
    cost: float = 0.0
    """Seconds that it took in this step."""

    def take(self, token: int) -> None:
        """Go on by one token. The library is not told of an end: its own account of what follows would be off."""
        if self.has_ended or token in self.eos_token_ids:
            self.has_ended = True
        else:
            started = time.thread_time()
            self.matcher.consume_token(token)
            self.seconds_left += _SECONDS_A_TOKEN
            self._pay(time.thread_time() - started)

    def fill(self, words: npt.NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next: (vocabulary / 32) words."""
        started = time.thread_time()
        self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._pay(time.thread_time() - started)

    def _pay(self, seconds: float) -> None:
        self.seconds_left -= seconds
        self.cost += seconds

    @property
    def is_hopeless(self) -> bool:
        """Whether the library gave up, or took too long."""
        return self.seconds_left < 0 or bool(self.matcher.is_error())


class GrammarMasks:
    """Follows the answers of the slots that have a grammar.

    The mask of a step needs the token of the step before it, which is launched but may not be done. The model's part of
    the step is launched first, so that the host waits for that token, and makes the mask, while the device is at work.
    """

    def __init__(self, batch: InputBatch, vocab_size: int) -> None:
        self._batch = batch
        self._vocab_size = vocab_size
        self._answers: dict[int, _Answer] = {}
        self._failed: dict[str, str] = {}
        self._seconds_left = _SECONDS_OF_ALL
        self._bits = torch.arange(32, dtype=torch.int32, device=batch.device)
        # On the device: a number from the host would be copied there by a call that waits for all work before it.
        self._never = torch.tensor(float("-inf"), device=batch.device)

    def add(self, slot: Slot, token_ids: list[int], matcher: LLMatcher | None) -> bool:
        """Take over a request's grammar; returns whether it has one.

        Args:
            slot: of the request.
            token_ids: its prompt and what it has answered so far.
            matcher: at the beginning of its answer; it stays there.
        """
        if matcher is None:
            return False
        request = slot.request
        answer = _Answer(request.request_id, matcher.deep_copy(), frozenset(request.eos_token_ids))
        for token in token_ids[len(request.prompt_token_ids) :]:
            answer.take(token)
        self._answers[slot.index] = answer
        return True

    def remove(self, index: int) -> None:
        """Forget a slot's grammar."""
        self._answers.pop(index, None)

    def apply(self, logits: Tensor, slots: _Ints) -> None:
        """Forbid what may not come, in place: logits (S, vocabulary) of these slots (S)."""
        if not self._answers:
            return
        rows = [row for row, slot in enumerate(slots.tolist()) if slot in self._answers]
        if not rows:
            return
        answers = [self._answers[int(slots[row])] for row in rows]
        for answer in answers:
            if answer.in_flight is not None:
                step, place = answer.in_flight
                answer.take(step.token(place))
                answer.in_flight = None
        for first in range(0, len(rows), SOME_ROWS):
            allowed = self._allowed(answers[first : first + SOME_ROWS])
            where = self._batch.upload(np.array(rows[first : first + SOME_ROWS], np.int64))
            logits[where] = torch.where(allowed, logits[where], self._never)
        self._give_up_dearest(answers)

    def launched(self, slots: _Ints, step: PendingStep) -> None:
        """The tokens of these slots are on their way, in this order."""
        if not self._answers:
            return
        for place, slot in enumerate(slots.tolist()):
            if slot in self._answers:
                self._answers[slot].in_flight = step, place

    def take_failed(self) -> dict[str, str]:
        """Requests whose grammar failed since the last call, each with the reason."""
        failed, self._failed = self._failed, {}
        return failed

    def _allowed(self, answers: Sequence[_Answer]) -> Tensor:
        """(answers, vocabulary) bool, on the device."""
        words = np.full((len(answers), -(-self._vocab_size // 32)), -1, np.int32)
        for answer, row in zip(answers, words, strict=True):
            if not answer.has_ended:
                answer.fill(row)
                if answer.is_hopeless:
                    self._failed[answer.request_id] = _TOO_COMPLEX
        packed = self._batch.upload(words)
        bits = (packed.unsqueeze(-1) >> self._bits) & 1
        return bits.flatten(1)[:, : self._vocab_size].bool()

    def _give_up_dearest(self, answers: Sequence[_Answer]) -> None:
        """Where all together take too long: each may keep within its limit, and many still hold up everybody."""
        spent = sum(answer.cost for answer in answers)
        left = self._seconds_left + _SECONDS_OF_ALL_A_STEP - spent
        self._seconds_left = min(_SECONDS_OF_ALL, max(0.0, left))
        for answer in sorted(answers, key=lambda answer: answer.cost, reverse=True) if left < 0 else ():
            if spent <= _SECONDS_OF_ALL_A_STEP or answer.cost < _CHEAP_SECONDS:
                break
            spent -= answer.cost
            self._failed[answer.request_id] = _TOO_COMPLEX
        for answer in answers:
            answer.cost = 0.0
