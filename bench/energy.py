"""What kernels take of a GPU's power: where it reaches its limit the clock falls, and only less energy is faster.

    python -m bench.energy

Times and joules of the two parts of a 7B model's layer that a step with a picture's prompt spends most of its time in.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from bench.kernels import HEADS, LINEARS, make_step, multiply_all, repeat
from bench.power import EnergyMeter
from engine.attention.triton_decode import DecodePlan, decode_attention, plan

_WARM_UP, _SECONDS = 0.5, 1.5
"""The counter is renewed some ten times a second."""


def measure(name: str, meter: EnergyMeter, run: Callable[[], object], calls: int) -> None:
    """Print milliseconds, watts and millijoules of one call, of which `run` makes so many."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    _replay(graph, _WARM_UP)
    joules, started = meter.joules(), time.monotonic()
    replays, clock = _replay(graph, _SECONDS), meter.megahertz()
    joules, seconds = meter.joules() - joules, time.monotonic() - started
    each = 1000 / (replays * calls)
    print(f"{name}: {seconds * each:.4f} ms, {joules / seconds:.0f} W, {joules * each:.1f} mJ, {clock} MHz", flush=True)


def _replay(graph: torch.cuda.CUDAGraph, seconds: float) -> int:
    replays, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        replays += 5
    return replays


def main() -> None:
    """Measure attention of 128 requests beside a prompt of 640 tokens, and the products of such steps."""
    meter = EnergyMeter()
    step = make_step([704] * 128, [640], (HEADS, torch.bfloat16), counted=True)
    in_use = plan(128, HEADS, exact=False, counted=True)
    for option in (in_use, DecodePlan(1, 64, 2, uses_dot=False)):
        attend = partial(decode_attention, **step.kwargs, chosen=option)
        measure(f"attention by {option}", meter, partial(repeat, attend, 4), 4)
    del step
    for rows in (640, 768):
        for name in ("qkv", "o", "gate_up", "down"):
            size_in, size_out = LINEARS[name]
            weights = [torch.randn(size_out, size_in, dtype=torch.bfloat16, device="cuda") for _ in range(8)]
            x = torch.randn(rows, size_in, dtype=torch.bfloat16, device="cuda")
            measure(f"{name} of {rows} rows", meter, partial(multiply_all, functional.linear, x, weights), len(weights))


if __name__ == "__main__":
    main()
