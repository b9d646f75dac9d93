"""A step that fails, wherever it does: its requests end with an error, all others and later ones get exact answers."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import engine.worker.model_runner
from engine.args import EngineArgs
from engine.config import create_config
from engine.core.engine_core import EngineCore
from engine.input_processor import InputProcessor
from engine.messages import EngineOutput
from engine.sampling_params import SamplingParams
from engine.step import SchedulerOutput
from engine.worker.pending import PendingStep
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec

Place = Callable[[EngineCore], tuple[Any, str]]

PLACES: dict[str, Place] = {
    "slot": lambda core: (core.runner._batch, "add"),
    "parameters": lambda core: (core.runner._sampler, "add"),
    "vision encoder": lambda core: (core.runner._vision, "_encode"),
    "upload": lambda core: (core.runner._batch, "upload"),
    "layout": lambda core: (core.runner._batch, "lay_out"),
    "model": lambda core: (core.runner.model.language_model, "forward"),
    "logits": lambda core: (core.runner.model, "logits"),
    "logits rule": lambda core: (core.runner._sampler._rules, "apply"),
    "sampler": lambda core: (core.runner._sampler, "sample"),
    "log probabilities": lambda core: (engine.worker.model_runner, "gather_logprobs"),
    "download": lambda core: (core.runner, "_download"),
    "result": lambda core: (PendingStep, "result"),
    "update": lambda core: (core.scheduler, "_take_token"),
}
OPTIONS: list[dict[str, Any]] = [
    {}, {"logprobs": 2}, {"logit_bias": {7: 1.0}}, {"prompt_logprobs": 1}, {"repetition_penalty": 1.1},
]  # fmt: skip
ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU ran out of memory"),
    (RuntimeError("CUDA error: an illegal instruction"), "the engine failed in this step"),
    (MemoryError(), "the engine failed in this step"),
]


@dataclass
class Fault:
    """Raises in place of one call of a function, or when that call is done."""

    function: Callable[..., Any]
    error: Exception
    calls_before: int
    late: bool
    is_done: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls_before -= 1
        strikes = self.calls_before < 0 and not self.is_done
        if strikes:
            self.is_done = True
        if strikes and not self.late:
            raise self.error
        result = self.function(*args, **kwargs)
        if strikes:
            raise self.error
        return result


@dataclass
class Bench:
    """A core with little room, and prompts whose answers are known."""

    core: EngineCore
    inputs: InputProcessor
    prompts: list[Any] = field(default_factory=list)
    exact: list[list[int]] = field(default_factory=list)
    count: int = 0
    queued: set[str] = field(default_factory=set)

    def add(self, number: int, *, salt: str = "") -> str:
        """Queue a prompt; returns the request's name."""
        self.count += 1
        prompt, params = self.prompts[number]
        name = f"{self.count}-{number}"
        (request,) = self.inputs.make_requests(
            prompt, params, max_tokens=params.max_tokens, arrival_time=float(self.count), request_id=name,
            cache_salt=salt,
        )  # fmt: skip
        assert not self.core.add(request)
        self.queued.add(request.request_id)
        return request.request_id

    def run(self) -> tuple[dict[str, list[int]], dict[str, str]]:
        """Answers and errors of all that is queued."""
        outputs: list[EngineOutput] = []
        for _ in range(2000):
            if not self.core.has_work:
                break
            outputs += self.core.step().outputs
            self.core.check_integrity()
        assert not self.core.has_work, "the engine does not come to an end"
        answers: dict[str, list[int]] = {}
        errors: dict[str, str] = {}
        ended: set[str] = set()
        for output in outputs:
            if output.request_id in ended:  # nobody listens any more
                assert output.error is not None
                continue
            answers.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason is not None:
                ended.add(output.request_id)
            if output.error is not None:
                errors[output.request_id] = output.error
        assert ended == self.queued, "a request has no end"
        self.queued = set()
        return {name: ids for name, ids in answers.items() if name not in errors}, errors

    def check(self, answers: dict[str, list[int]]) -> None:
        for name, token_ids in answers.items():
            assert token_ids == self.exact[int(name.split("-")[1].split("/")[0])], name

    def check_empty(self) -> None:
        """Nothing is held for anyone, but the worker's slots of requests that it has not been told the end of."""
        core = self.core
        core.check_integrity()
        stats = core.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0)
        batch = core.runner._batch
        assert batch.slots.keys() <= set(core.scheduler._ended_ids)
        assert len(batch.slots) + len(batch._free) == core.scheduler.max_num_seqs
        assert core.runner._sampler._rules._by_slot.keys() <= {slot.index for slot in batch.slots.values()}
        assert core.runner._vision is not None
        known = core.scheduler.encoder_cache._sizes.keys() | set(core.scheduler.encoder_cache._evicted)
        assert core.runner._vision._embeddings.keys() <= known


@pytest.fixture(scope="module")
def bench(checkpoint: MakeCheckpoint) -> Bench:
    spec = CheckpointSpec(seed=2, num_key_value_heads=2)
    args = EngineArgs(
        model=str(checkpoint(spec)), dtype="float32", device="cpu", max_num_seqs=4, max_num_batched_tokens=48,
        num_gpu_blocks_override=24,
    )  # fmt: skip
    core = EngineCore(create_config(args))
    bench = Bench(core, InputProcessor(core.runner.config, core.max_model_len))
    random_ = np.random.default_rng(5)
    for number in range(10):
        pixels = [random_.integers(0, 256, (40, 40, 3), np.uint8) for _ in range(number % 3)]
        images = [bench.inputs.prepare_image(Image.fromarray(array)) for array in pixels]
        text = "USER: " + "<image>\n" * len(images) + f"What is number {number}? " * (1 + number % 4) + "ASSISTANT:"
        params = SamplingParams(temperature=0, max_tokens=4 + number // 2, **OPTIONS[number % len(OPTIONS)])
        bench.prompts.append((bench.inputs.process(bench.inputs.encode(text), images), params))
    for number in range(len(bench.prompts)):
        name = bench.add(number)
        answers, errors = bench.run()
        assert not errors
        bench.exact.append(answers[name])
    return bench


@pytest.fixture(params=[1, 2], ids=["one step", "two steps on their way"])
def depth(request: pytest.FixtureRequest, bench: Bench) -> Iterator[int]:
    before, bench.core._depth = bench.core._depth, request.param
    yield request.param
    bench.core._depth = before


@pytest.mark.parametrize("late", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_fails(
    place: str, late: bool, depth: int, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seeded = random.Random(f"{place} {late} {depth}")
    error, message = seeded.choice(ERRORS)
    bench.core.scheduler.encoder_cache.clear()  # so that there is something to encode
    owner, name = PLACES[place](bench.core)
    fault = Fault(getattr(owner, name), error, seeded.randrange(2), late)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: fault(*args, **kwargs))
    names = [bench.add(number, salt=f"{place} {late} {depth}") for number in seeded.sample(range(10), 10)]
    answers, errors = bench.run()
    assert fault.is_done
    assert answers.keys() | errors.keys() == set(names)
    assert 1 <= len(errors) <= 8 and set(errors.values()) == {message}
    bench.check(answers)
    bench.check_empty()
    for number in range(10):
        bench.add(number)
    answers, errors = bench.run()
    assert len(answers) == 10 and not errors
    bench.check(answers)
    assert "a step failed; its requests end with an error" in caplog.text


def test_a_step_that_cannot_be_launched_leaves_the_one_before_it_whole(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer whose last token is on its way comes to its end."""
    monkeypatch.setattr(bench.core, "_depth", 2)
    short, long = sorted(range(10), key=lambda number: len(bench.exact[number]))[::9]
    assert len(bench.exact[short]) < len(bench.exact[long])
    names = [bench.add(short), bench.add(long)]
    last = {names[0]: len(bench.prompts[short][0].token_ids) + len(bench.exact[short]) - 1}

    def execute(step: SchedulerOutput) -> PendingStep:
        if not last:  # the last token of the short answer was launched in the step before
            raise torch.OutOfMemoryError("CUDA out of memory.")
        pending = real(step)
        for part in step.requests:
            if part.samples and last.get(part.request_id) == part.start + part.num_tokens:
                del last[part.request_id]
        return pending

    real = bench.core.runner.execute
    monkeypatch.setattr(bench.core.runner, "execute", execute)
    answers, errors = bench.run()
    assert errors == {names[1]: "the GPU ran out of memory"}
    bench.check(answers)
    bench.check_empty()


def test_steps_that_fail_again_and_again(
    depth: int, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests come, leave and fail in any order, and none is forgotten."""
    seeded = random.Random(depth)
    chance = 0.0

    def shaky(function: Callable[..., Any], late: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            struck = seeded.random() < chance
            if struck and not late:
                raise RuntimeError("struck")
            result = function(*args, **kwargs)
            if struck:
                raise RuntimeError("struck")
            return result

        return call

    for number, find in enumerate(PLACES.values()):
        owner, name = find(bench.core)
        monkeypatch.setattr(owner, name, shaky(getattr(owner, name), number % 2 == 0))
    outcomes = {"right": 0, "failed": 0, "left": 0}
    for _ in range(30):
        chance = 0.004
        names = {bench.add(seeded.randrange(10)) for _ in range(seeded.randrange(1, 9))}
        bench.queued = set()
        answers: dict[str, list[int]] = {name: [] for name in names}
        while names:
            if seeded.random() < 0.05:
                name = seeded.choice(sorted(names))
                names.remove(name)
                bench.core.abort([name])
                outcomes["left"] += 1
            assert bench.core.has_work or not names, "a request is lost"
            for output in bench.core.step().outputs:
                if output.request_id not in names:
                    continue
                answers[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    names.remove(output.request_id)
                    outcomes["failed" if output.error else "right"] += 1
                    if output.error is None:
                        bench.check({output.request_id: answers[output.request_id]})
            bench.core.check_integrity()
        chance = 0.0
        while bench.core.has_work:
            bench.core.step()
        bench.check_empty()
    assert min(outcomes.values()) > 10, outcomes
