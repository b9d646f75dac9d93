"""Times the kernels on a GPU against what the hardware could do.

    python -m bench.kernels [decode|linear]

Everything is timed inside a CUDA graph, so that launching costs nothing, and over enough memory that no cache helps.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.attention.triton_decode import DecodePlan, decode_attention, plan
from engine.kernels import stream_linear
from engine.kernels.row_linear import RowPlan, row_linear

Plan = TypeVar("Plan")
HEADS, HEAD_DIM, BLOCK = 32, 128, 16
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


def decode_case(batch: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, AttentionMetadata]:
    """Query, cache of this type and metadata of a batch of equally long sequences."""
    blocks = -(-length // BLOCK)
    cache = torch.randn(2, batch * blocks, BLOCK, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda").to(dtype)
    table = torch.randperm(batch * blocks, device="cuda").int().view(batch, blocks)
    rows = torch.arange(batch, device="cuda").int()
    positions = torch.full((batch,), length - 1, device="cuda").int()
    starts, slots, none = list(range(batch + 1)), list(range(batch)), table[:0]
    metadata = AttentionMetadata(
        batch, starts, [length] * batch, slots, rows, positions, positions, table, prefills=none, tiles=none
    )
    return torch.randn(batch, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda"), cache, metadata


def tune_decode(speed: float, *, full: bool) -> None:
    """Print the time of one layer's decode attention, and its share of the bandwidth, for the plan in use or many."""
    cases = ((128, 704), (32, 1024), (8, 704), (1, 704), (1, 4000))
    for (batch, length), dtype in itertools.product(cases, (torch.bfloat16, torch.float8_e4m3fn)):
        query, cache, metadata = decode_case(batch, length, dtype)
        output = torch.empty_like(query)
        scales = torch.ones(2, HEADS, device="cuda") if dtype == torch.float8_e4m3fn else None
        attend = partial(decode_attention, query, cache, output, metadata, scale=0.1, window=0, kv_scales=scales)
        floor = 2 * batch * length * HEADS * HEAD_DIM * dtype.itemsize / speed * 1000
        in_use = plan(batch, HEADS, exact=False)
        splits = {128: (1, 2), 32: (1, 2, 4), 8: (4, 8), 1: (16,)}[batch]
        warps = (4, 8) if batch == 128 else (4,)
        shapes = itertools.product(splits, (64, 128), warps, (2, 3), (False, True)) if full else ()
        options = [in_use, *(DecodePlan(*shape) for shape in shapes)]
        times = time_all([(option, partial(attend, chosen=option)) for option in options], 2 if batch > 8 else 8)
        print(f"decode batch {batch} length {length} cache {dtype}: floor {floor:.4f} ms; in use {in_use}")
        for taken, option in times[:4]:
            print(f"    {taken:.4f} ms, {floor / taken:.0%}: {option}")


def tune_linear(speed: float, *, full: bool) -> None:
    """Print the time of each product by cuBLAS, and by our kernels: many plans for one row, one for more."""
    total: dict[tuple[int, str], float] = defaultdict(float)
    for rows, (name, (size_in, size_out)) in itertools.product((1, 2, 4, 16, 32, 64, 128), LINEARS.items()):
        copies = max(2, -(-400_000_000 // (2 * size_in * size_out)))
        weights = [torch.randn(size_out, size_in, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
        x = torch.randn(rows, size_in, dtype=torch.bfloat16, device="cuda")
        floor = weights[0].nbytes / speed * 1000
        cublas = milliseconds(partial(multiply_all, torch.nn.functional.linear, x, weights)) / copies
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
    parser.add_argument("what", nargs="*", choices=["decode", "linear"], default=["decode", "linear"])
    parser.add_argument("--full", action="store_true", help="try many plans, not only the one in use")
    args = parser.parse_args()
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}: {speed / 1e9:.0f} GB/s")
    if "decode" in args.what:
        tune_decode(speed, full=args.full)
    if "linear" in args.what:
        tune_linear(speed, full=args.full)


if __name__ == "__main__":
    main()
