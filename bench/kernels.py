"""Times the kernels on a GPU against what the hardware could do.

    python -m bench.kernels [all|decode|linear|mixed|prefill|shared] [--full]

Everything is timed inside a CUDA graph, so that launching costs nothing, and over enough memory that no cache helps
(but for prompts: a step has just written their keys and values).
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from torch.nn import functional

from engine.attention import AttentionMetadata, tile_tokens
from engine.attention.triton_decode import DecodePlan, decode_attention, plan
from engine.attention.triton_prefill import prefill_attention
from engine.kernels import stream_linear
from engine.kernels.row_linear import RowPlan, row_linear

Plan = TypeVar("Plan")
Cached = tuple[int, torch.dtype]
"""Key-value heads and type of a cache."""
HEADS, HEAD_DIM, BLOCK = 32, 128, 16
MOST_REQUESTS = 256
"""For which a step's graph has room."""
CACHES: list[Cached] = list(itertools.product((HEADS, 8), (torch.bfloat16, torch.float8_e4m3fn)))
LINEARS = {
    "qkv": (4096, 12288),
    "o": (4096, 4096),
    "gate_up": (4096, 22016),
    "down": (11008, 4096),
    "head": (4096, 32064),
}
"""Inputs and outputs of Llama-7B's linear layers."""
LAYERS = {"qkv": 32, "o": 32, "gate_up": 32, "down": 32, "head": 1}


def milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Of one call, replayed as a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def bandwidth() -> float:
    """Bytes a second of reading, by a sum over 4 GB."""
    data = torch.ones(1 << 31, dtype=torch.bfloat16, device="cuda")
    return data.nbytes / milliseconds(lambda: data.sum()) * 1000


@dataclass(frozen=True, slots=True)
class Step:
    """What the kernels attend to in one layer of one step."""

    query: Tensor
    cache: Tensor
    metadata: AttentionMetadata

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments of `decode_attention` and `prefill_attention`."""
        kv_heads = self.cache.shape[3]
        scales = torch.ones(2, kv_heads, device="cuda") if self.cache.dtype == torch.float8_e4m3fn else None
        return {
            "query": self.query, "cache": self.cache, "output": torch.empty_like(self.query), "metadata": self.metadata,
            "scale": 0.1, "window": 0, "kv_scales": scales,
        }  # fmt: skip


def make_step(
    lengths: Sequence[int], prompts: Sequence[int], cached: Cached, *, counted: bool = False, shared: int = 0
) -> Step:
    """Requests with one token whose sequences are so long, then prompts all of whose tokens are computed.

    Args:
        lengths: of the former.
        prompts: tokens of the latter.
        cached: key-value heads and type of the cache.
        counted: only the GPU knows how the step is cut, as in `engine.worker.step_graphs`.
        shared: tokens with which all of the former begin.
    """
    kv_heads, dtype = cached
    decodes, tile = len(lengths), tile_tokens(HEADS, kv_heads, torch.bfloat16)
    counts = [1] * decodes + list(prompts)
    sequences = [*lengths, *prompts]
    needed = [-(-length // BLOCK) for length in sequences]
    table = torch.zeros(len(sequences), max(needed), dtype=torch.int32)
    for row, blocks in zip(table, torch.randperm(sum(needed)).int().split(needed), strict=True):
        row[: len(blocks)] = blocks
    table[:decodes, : shared // BLOCK] = table[0, : shared // BLOCK]
    cache = torch.randn(2, sum(needed), BLOCK, kv_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda").to(dtype)
    starts = list(itertools.accumulate(counts, initial=0))
    rows = torch.arange(len(sequences)).repeat_interleave(torch.tensor(counts)).int()
    positions = torch.cat([torch.arange(n - count, n) for count, n in zip(counts, sequences, strict=True)]).int()
    owners = list(range(decodes, len(sequences)))
    prefills = torch.tensor([starts[decodes:-1], prompts, prompts, owners]).int()
    pairs = [(i, first) for i, count in enumerate(prompts) for first in range(0, count, tile)]
    tiles = torch.tensor(pairs).int().view(-1, 2).T.contiguous()
    on_device = None
    if counted:
        on_device = torch.tensor([decodes, len(pairs)]).int().cuda()
        decodes = min(starts[-1], MOST_REQUESTS)
        prefills = functional.pad(prefills, (0, MOST_REQUESTS - len(prompts)))
        tiles = functional.pad(tiles, (0, MOST_REQUESTS))
    found = torch.tensor([len(lengths) if shared else 0, shared, 0]).int().cuda() if counted or shared else None
    places = positions.cuda()
    metadata = AttentionMetadata(
        decodes, starts, sequences, [], rows.cuda(), places, places, table.cuda(), prefills.cuda(), tiles.cuda(),
        on_device, found,
    )  # fmt: skip
    return Step(torch.randn(starts[-1], HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda"), cache, metadata)


def decode_plans(splits: Sequence[int]) -> list[DecodePlan]:
    """To try. With 3 stages a program holds one tile of keys, with 5 two: where they lie is a stage of its own."""
    by_tensor_cores = itertools.product(splits, (32, 64, 128), (4, 8), (2, 3, 5))
    plain = itertools.product(splits, (32, 64, 128), (2, 4))
    return [DecodePlan(*shape) for shape in by_tensor_cores] + [DecodePlan(*shape, uses_dot=False) for shape in plain]


def show_decode(title: str, step: Step, floor: float, plans: Sequence[DecodePlan], calls: int) -> None:
    """Print the time of one layer's decode attention by the plan in use and by others."""
    metadata, kv_heads = step.metadata, step.cache.shape[3]
    in_use = plan(
        metadata.num_decodes, kv_heads, exact=False, counted=metadata.counts is not None,
        fp8=kv_heads == HEADS and step.cache.dtype == torch.float8_e4m3fn,
    )  # fmt: skip
    attend = partial(decode_attention, **step.kwargs)
    times = time_all([(option, partial(attend, chosen=option)) for option in [in_use, *plans]], calls)
    print(f"{title}, {kv_heads} kv heads, cache {step.cache.dtype}: floor {floor:.4f} ms; in use {in_use}")
    for taken, option in times[:4]:
        print(f"    {taken:.4f} ms, {floor / taken:.0%}: {option}", flush=True)


def tune_decode(speed: float, *, full: bool) -> None:
    """Steps in which every request has one token."""
    cases = ((128, 704), (32, 1024), (8, 704), (1, 704), (1, 4000))
    splits = {128: (1, 2), 32: (1, 2, 4), 8: (4, 8), 1: (16,)}
    for (batch, length), cached in itertools.product(cases, CACHES):
        plans = decode_plans(splits[batch]) if full else []
        step, floor = make_step([length] * batch, [], cached), reading(batch * length, cached) / speed * 1000
        show_decode(f"decode batch {batch} length {length}", step, floor, plans, 2 if batch > 8 else 8)


def tune_mixed(speed: float, *, full: bool) -> None:
    """The requests with one token of steps that compute a prompt too."""
    for (batch, length), cached in itertools.product(((128, 704), (32, 1024), (8, 704)), CACHES):
        plans = decode_plans((1, 2, 4)) if full else []
        step = make_step([length] * batch, [640], cached, counted=True)
        floor = reading(batch * length, cached) / speed * 1000
        show_decode(f"mixed batch {batch} length {length}", step, floor, plans, 2 if batch > 8 else 8)


def tune_shared(speed: float, *, full: bool) -> None:
    """Requests with one token that begin alike, alone and beside a prompt."""
    batch, length, shared = 128, 704, 624
    for counted, cached in itertools.product((False, True), CACHES):
        plans = decode_plans((1, 2, 4)) if full else []
        step = make_step([length] * batch, [640] if counted else [], cached, counted=counted, shared=shared)
        floor = reading(batch * (length - shared) + shared, cached) / speed * 1000
        show_decode(f"shared {shared} of {length}, batch {batch}{', mixed' * counted}", step, floor, plans, 8)


def time_prefill() -> None:
    """Print the time of one layer's attention of prompts, beside requests with one token."""
    rate = product_rate()
    print(f"products of bfloat16: {rate / 1e12:.0f} TFLOP/s")
    for prompts, cached in itertools.product(([640], [2048], [640] * 4, [64] * 16), CACHES):
        step = make_step([704] * 8, prompts, cached, counted=True)
        # Two products, of the keys before each token and its own.
        floor = sum(4 * HEADS * HEAD_DIM * count * (count + 1) / 2 for count in prompts) / rate * 1000
        (taken, _), *_ = time_all([(None, partial(prefill_attention, **step.kwargs))], 20)
        name = f"{len(prompts)} of {prompts[0]}, {cached[0]} kv heads, cache {cached[1]}"
        print(f"prefill {name}: floor {floor:.4f} ms, {taken:.4f} ms, {floor / taken:.0%}", flush=True)


def reading(tokens: int, cached: Cached) -> int:
    """Bytes of so many keys and values."""
    kv_heads, dtype = cached
    return 2 * tokens * kv_heads * HEAD_DIM * dtype.itemsize


def product_rate() -> float:
    """Operations a second of a large product."""
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return 2 * 8192**3 / milliseconds(lambda: x @ x) * 1000


def tune_linear(speed: float, *, full: bool) -> None:
    """Print the time of each product by cuBLAS, and by our kernels: many plans for one row, one for more."""
    total: dict[tuple[int, str], float] = defaultdict(float)
    for rows, (name, (size_in, size_out)) in itertools.product((1, 2, 4, 16, 32, 64, 128), LINEARS.items()):
        copies = max(2, -(-400_000_000 // (2 * size_in * size_out)))
        weights = [torch.randn(size_out, size_in, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
        x = torch.randn(rows, size_in, dtype=torch.bfloat16, device="cuda")
        floor = weights[0].nbytes / speed * 1000
        cublas = milliseconds(partial(multiply_all, functional.linear, x, weights)) / copies
        options: list[Any] = [stream_linear.plan(rows, size_in, size_out)]
        multiply: Callable[..., Tensor] = stream_linear.stream_linear
        if rows == 1:
            shapes = itertools.product((4, 8, 16), (512, 1024, 2048), (4, 8), (1, 3)) if full else ()
            options, multiply = [RowPlan(), *(RowPlan(*shape) for shape in shapes)], row_linear
        ours = [(option, partial(multiply_all, partial(multiply, plan=option), x, weights)) for option in options]
        times = [(taken / copies, option) for taken, option in time_all(ours, 1)]
        print(f"linear {name} rows {rows}: floor {floor:.4f} ms, cuBLAS {cublas:.4f} ({floor / cublas:.0%})")
        for taken, option in times[:3]:
            print(f"    {taken:.4f} ms, {floor / taken:.0%}: {option}")
        for way, taken in (("floor", floor), ("cuBLAS", cublas), ("best", min([cublas, *(t for t, _ in times)]))):
            total[rows, way] += taken * LAYERS[name]
    for (rows, way), taken in total.items():
        print(f"all linears, rows {rows}, {way}: {taken:.3f} ms")


def multiply_all(multiply: Callable[..., Tensor], x: Tensor, weights: list[Tensor]) -> None:
    """One product with each weight, so that none is in the cache when it comes round again."""
    for weight in weights:
        multiply(x, weight)


def time_all(runs: Sequence[tuple[Plan, Callable[[], object]]], calls: int) -> list[tuple[float, Plan]]:
    """Milliseconds of each plan that the GPU can hold, the fastest first."""
    times = []
    for option, run in runs:
        try:
            times.append((milliseconds(partial(repeat, run, calls)) / calls, option))
        except triton.runtime.errors.OutOfResources:
            print(f"    too much for the GPU: {option}")
    return sorted(times, key=lambda pair: pair[0])


def repeat(run: Callable[[], object], times: int) -> None:
    """Call so often."""
    for _ in range(times):
        run()


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Time the kernels on a GPU.")
    whats = ["decode", "linear", "mixed", "prefill", "shared"]
    parser.add_argument("what", nargs="*", choices=["all", *whats], default="all")
    parser.add_argument("--full", action="store_true", help="try many plans, not only the one in use")
    args = parser.parse_args()
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}: {speed / 1e9:.0f} GB/s")
    tuners = {"decode": tune_decode, "linear": tune_linear, "mixed": tune_mixed, "shared": tune_shared}
    for what in whats if "all" in args.what else args.what:
        if what == "prefill":
            time_prefill()
        else:
            tuners[what](speed, full=args.full)


if __name__ == "__main__":
    main()
