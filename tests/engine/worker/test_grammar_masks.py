"""Masks allow what the grammar does, of the right rows, and follow tokens that are still on their way."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.grammar.structured_outputs import StructuredOutputs
from engine.messages import EngineRequest
from engine.sampling_params import SamplingParams
from engine.step import NewRequest
from engine.worker import grammar_masks
from engine.worker.grammar_masks import GrammarMasks
from engine.worker.input_batch import InputBatch
from engine.worker.pending import PendingStep
from engine.worker.sampler import Sampler
from tests.engine.grammar.accepting import VOCAB, compiler, tokens
from tests.random_tokenizer import EOS_ID

PROMPT = [1, 2, 300]


class Bench:
    """Masks with their slots, worked as the model runner does."""

    def __init__(self) -> None:
        self.batch = InputBatch(8, 256, 16, torch.device("cpu"), long_start=None)
        self.masks = GrammarMasks(self.batch, VOCAB)

    def add(self, name: str, regex: str | None, output: tuple[int, ...] = ()) -> int:
        grammar = None if regex is None else StructuredOutputs(regex=regex).source()
        request = EngineRequest(name, PROMPT, SamplingParams(), 100, seed=0, eos_token_ids=[EOS_ID], grammar=grammar)
        slot = self.batch.add(NewRequest(request, [*PROMPT, *output], [0]))
        matcher = None if grammar is None else compiler().matcher(grammar)
        assert self.masks.add(slot, [*PROMPT, *output], matcher) == (regex is not None)
        return slot.index

    def allowed(self, *slots: int) -> list[set[int]]:
        """Tokens that may come, of each row; what is allowed keeps its logit."""
        logits = torch.arange(len(slots) * VOCAB, dtype=torch.float32).reshape(len(slots), VOCAB)
        before = logits.clone()
        self.masks.apply(logits, np.array(slots, np.int64))
        kept = logits == before
        assert bool((logits[~kept] == float("-inf")).all())
        return [set(np.flatnonzero(row.numpy()).tolist()) for row in kept]

    def launched(self, chosen: dict[int, int]) -> "Step":
        step = Step(chosen)
        self.masks.launched(np.array(list(chosen), np.int64), step)
        return step


class Step(PendingStep):
    """Counts how often somebody waited for it."""

    def __init__(self, chosen: dict[int, int]) -> None:
        super().__init__([], torch.tensor(list(chosen.values())), None, [], None, None, failed={})
        self.waits = 0

    def token(self, place: int) -> int:
        self.waits += 1
        return super().token(place)


def ids(*letters: str) -> set[int]:
    """Each is a token, and a byte too."""
    return {token for letter in letters for token in (*tokens(letter), EOS_ID + 1 + ord(letter))}


ALL = set(range(VOCAB))
A, B, C = (tokens(letter)[0] for letter in "abc")


def test_rows_without_a_grammar_are_left_alone() -> None:
    bench = Bench()
    plain, formed, other = bench.add("plain", None), bench.add("formed", "a|b"), bench.add("other", "c")
    assert bench.allowed(plain) == [ALL]
    assert bench.allowed(formed, plain, other, plain) == [ids("a", "b"), ALL, ids("c"), ALL]
    assert bench.allowed(other, formed) == [ids("c"), ids("a", "b")]


def test_tokens_on_their_way_are_waited_for_once() -> None:
    bench = Bench()
    one, plain, two = bench.add("one", "abc"), bench.add("plain", None), bench.add("two", "cba")
    assert bench.allowed(one, plain, two)[2] & ids("a", "b", "c") == ids("c")
    step = bench.launched({two: C, plain: 5, one: A})
    assert step.waits == 0
    assert [row & ids("a", "b", "c") for row in bench.allowed(one, two)] == [ids("b"), ids("b")]
    assert step.waits == 2
    assert bench.allowed(two)[0] & ids("a", "b", "c") == ids("b") and step.waits == 2


def test_a_complete_answer_may_only_end_and_then_do_as_it_likes() -> None:
    """At most one step was launched beyond the end; what it brings is thrown away."""
    bench = Bench()
    slot, other = bench.add("one", "a"), bench.add("other", "b")
    bench.allowed(slot)
    bench.launched({slot: A})
    assert bench.allowed(slot) == [{EOS_ID}]
    bench.launched({slot: EOS_ID})
    assert bench.allowed(slot) == [ALL]
    bench.launched({slot: 17})
    assert bench.allowed(slot, other) == [ALL, ids("b")]
    assert not bench.masks.take_failed()


def test_a_preempted_answer_goes_on_where_it_was() -> None:
    bench = Bench()
    slot = bench.add("one", "abc")
    bench.allowed(slot)
    bench.launched({slot: A})
    bench.masks.remove(slot)
    bench.batch.remove("one")
    plain = bench.add("plain", None)
    assert plain == slot and bench.allowed(plain) == [ALL]
    again = bench.add("one", "abc", (A, B))
    assert bench.allowed(again) == [ids("c")]


def test_what_fails_is_told_once() -> None:
    bench = Bench()
    slot, other = bench.add("big", "(.{1,1000}){1,1000}"), bench.add("other", "b")
    for _ in range(100):
        bench.allowed(slot, other)
        failed = bench.masks.take_failed()
        if failed:
            break
        bench.launched({slot: A})
    assert failed == {"big": "structured_outputs: the grammar became too complex"} and not bench.masks.take_failed()
    assert bench.allowed(other) == [ids("b")]


def test_a_grammar_that_takes_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """All others wait for its masks."""
    bench = Bench()
    slot, other = bench.add("slow", "a+"), bench.add("other", "b")
    bench.masks._answers[slot].seconds_left = 0.0
    monkeypatch.setattr(grammar_masks, "_SECONDS_A_TOKEN", 0.0)
    bench.allowed(slot, other)
    assert set(bench.masks.take_failed()) == {"slow"}


def test_many_that_take_long_together_are_given_up() -> None:
    """Each keeps within its own limit; the dearest go, until the others fit, and no cheap one does."""
    bench = Bench()
    costs = {"a": 0.03, "b": 0.02, "c": 0.04, "d": 0.001}
    slots = [bench.add(name, f"{name}+") for name in costs]
    for slot, cost in zip(slots, costs.values(), strict=True):
        answer = SimpleNamespace(
            request_id=bench.masks._answers[slot].request_id,
            in_flight=None,
            has_ended=False,
            is_hopeless=False,
            cost=0.0,
        )
        answer.fill = partial(_charge, answer, cost)
        bench.masks._answers[slot] = answer  # type: ignore[assignment]
    steps = 0
    while not (failed := bench.masks.take_failed()):
        bench.allowed(*slots)
        steps += 1
    # 41 ms of each step are too much, and half a second is there to begin with.
    assert set(failed) == {"a", "c"} and steps == 13


def _charge(answer: Any, cost: float, words: Any) -> None:
    answer.cost += cost


def test_many_rows_at_once() -> None:
    bench = Bench()
    slots = [bench.add(str(number), f"{'abc'[number % 3]}+") for number in range(8)]
    rows: list[Any] = bench.allowed(*slots)
    assert [row & ids("a", "b", "c") for row in rows] == [ids("abc"[number % 3]) for number in range(8)]


def test_masks_are_of_the_models_vocabulary() -> None:
    """Which has columns that the tokenizer does not know: none of them may come."""
    bench = Bench()
    slot = bench.add("any", "(?s:.)*")
    allowed = bench.allowed(slot)[0]
    assert EOS_ID in allowed and max(allowed) < VOCAB - 10 and len(allowed) > 600
    logits: Tensor = torch.zeros(1, VOCAB)
    bench.masks.apply(logits, np.array([slot]))
    assert logits.shape == (1, VOCAB)


def test_the_sampler_does_not_take_a_row_with_a_grammar_for_a_plain_one() -> None:
    """Plain greedy rows go by what a CUDA graph chose."""
    bench = Bench()
    sampler = Sampler(bench.batch, 8, VOCAB, bench.masks)
    greedy = SamplingParams(temperature=0)
    for name, grammar in (("plain", None), ("formed", StructuredOutputs(regex="a").source())):
        request = EngineRequest(name, PROMPT, greedy, 100, seed=0, eos_token_ids=[EOS_ID], grammar=grammar)
        slot = bench.batch.add(NewRequest(request, PROMPT, [0]))
        sampler.add(slot, PROMPT, None if grammar is None else compiler().matcher(grammar))
        assert sampler.is_plain(np.array([slot.index])) == (grammar is None)
        sampler.remove(slot.index)
        bench.batch.remove(name)
