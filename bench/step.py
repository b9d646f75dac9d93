"""Times whole steps of a model: what must move, how long it takes, and on a GPU the power.

    python -m bench.step [--model MODEL] [--requests 1 8 32 128] [--context 704] [--prompt 640] [--kv-cache-dtype fp8]

In each step so many requests compute their newest token; with `--prompt` a prompt of so many tokens is computed beside.
Weights are random. "Of memory's speed" is what must be read, the weights and the keys and values, in the time it takes,
against the speed at which a large sum reads.
"""

import argparse
import time
from dataclasses import dataclass

import torch

from bench.power import EnergyMeter
from engine import LLM, SamplingParams
from engine.messages import EngineRequest
from engine.step import NewRequest, ScheduledRequest, SchedulerOutput
from engine.worker.layer_caches import block_bytes
from engine.worker.model_runner import ModelRunner

_WARM_UP = 0.2
"""Of the time that is measured."""


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Of one step."""

    ms: float
    bytes_read: int
    watts: float | None
    joules: float | None


class StepBench:
    """Repeats steps of requests that hold blocks of their own; each writes its newest token to the same place again.

    Args:
        runner: without any requests.
        context: tokens of each sequence, the newest counted in.
        seconds: for which a step is repeated.
    """

    def __init__(self, runner: ModelRunner, context: int, *, seconds: float) -> None:
        self._seconds = seconds
        self._runner = runner
        self._context = context
        self._names: list[str] = []
        self._next_block = 0
        self._meter = EnergyMeter() if runner.device.type == "cuda" else None

    def measure(self, requests: int, prompt: int) -> StepFigures:
        """A step of so many requests with one token each, and a prompt of so many tokens beside them."""
        runner, blocks = self._runner, 0
        step = SchedulerOutput(finished_ids=self._names)
        self._names, self._next_block = [], 0
        for _ in range(requests):
            self._add(step, self._context, self._context - 1)
            blocks += -(-self._context // runner.config.block_size)
        if prompt:
            self._add(step, prompt, 0)
        runner.execute(step).result()
        again = SchedulerOutput(requests=step.requests)
        self._repeat(again, _WARM_UP * self._seconds)
        joules, started = self._joules(), time.perf_counter()
        count = self._repeat(again, self._seconds)
        seconds, joules = time.perf_counter() - started, self._joules() - joules
        return StepFigures(
            ms=seconds * 1000 / count,
            bytes_read=weight_bytes(runner) + blocks * block_bytes(runner.config),
            watts=None if self._meter is None else joules / seconds,
            joules=None if self._meter is None else joules / count,
        )

    def _add(self, step: SchedulerOutput, length: int, start: int) -> None:
        name, count = str(len(self._names)), -(-length // self._runner.config.block_size)
        blocks = list(range(self._next_block, self._next_block + count))
        if blocks[-1] >= self._runner.num_blocks:
            raise ValueError("the KV cache is too small for so many requests of so many tokens")
        tokens = [(7 * len(self._names) + index) % 1000 + 5 for index in range(length)]
        request = EngineRequest(name, tokens, SamplingParams(temperature=0, ignore_eos=True), max_tokens=2, seed=0)
        step.new_requests.append(NewRequest(request, tokens, blocks))
        step.requests.append(ScheduledRequest(name, start, length - start, True, [], num_output_tokens=0))
        self._names.append(name)
        self._next_block += count

    def _repeat(self, step: SchedulerOutput, seconds: float) -> int:
        """Launch as the engine does, one step ahead."""
        count, end = 0, time.perf_counter() + seconds
        pending = self._runner.execute(step)
        while time.perf_counter() < end:
            launched = self._runner.execute(step)
            pending.result()
            pending = launched
            count += 1
        pending.result()
        return count + 1

    def _joules(self) -> float:
        return 0.0 if self._meter is None else self._meter.joules()


def weight_bytes(runner: ModelRunner) -> int:
    """What a step of one token reads: all of the language model, but of the embeddings a row at most."""
    model = runner.model
    tied = runner.config.text_config.tie_word_embeddings
    parts = [model.language_model.layers] + ([model.language_model.embed_tokens] if tied else [model.lm_head])
    return sum(weight.nbytes for part in parts for weight in part.parameters())


def read_speed(device: torch.device) -> float:
    """Bytes a second of a large sum."""
    if device.type == "cuda":
        from bench.kernels import bandwidth  # triton is installed with CUDA builds of torch only

        return bandwidth()
    data, seconds = torch.ones(100_000_000), []
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return data.nbytes / min(seconds)


def main(arguments: list[str] | None = None) -> None:
    """Print a row for each number of requests."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=704)
    parser.add_argument("--prompt", type=int, nargs="+", default=[0])
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--seconds", type=float, default=2.0, help="for which each step is repeated (default: 2)")
    args = parser.parse_args(arguments)
    longest = max(args.context, *args.prompt)
    llm = LLM(
        args.model, device=args.device, dtype=args.dtype, load_format="dummy", max_model_len=longest + 16,
        kv_cache_dtype=args.kv_cache_dtype, max_num_seqs=max(args.requests) + 1,
        max_num_batched_tokens=max(2048, longest + max(args.requests)),
    )  # fmt: skip
    runner = llm._core.runner
    speed = read_speed(runner.device)
    print(
        f"a sum reads {speed / 1e9:,.0f} GB/s; sequences of {args.context} tokens, {runner.config.kv_cache_dtype} cache"
    )
    bench = StepBench(runner, args.context, seconds=args.seconds)
    for prompt in args.prompt:
        for requests in args.requests:
            found = bench.measure(requests, prompt)
            share = found.bytes_read / found.ms * 1000 / speed
            line = f"{requests} requests" + (f" and a prompt of {prompt}" if prompt else "")
            line += f": {found.ms:.2f} ms, {found.bytes_read / 1e9:.1f} GB, {share:.0%} of memory's speed"
            print(line + ("" if found.watts is None else f", {found.watts:.0f} W, {found.joules:.2f} J"), flush=True)


if __name__ == "__main__":
    main()
