"""What a trace of `--profile-dir` says: how long the GPU stood still, and what took its time.

python -m bench.trace FILE
"""

import argparse
import gzip
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_SHOWN = 20


@dataclass(slots=True)
class GpuUse:
    """Milliseconds of the GPU, from its first work in the trace to its last."""

    span: float
    busy: float
    by_name: dict[str, tuple[float, int]]
    """Time and number of each kernel, the longest first; kernels that overlap count twice."""

    @property
    def idle_share(self) -> float:
        """Share of the span in which nothing ran."""
        return 1 - self.busy / self.span if self.span else 0.0


def gpu_use(events: list[dict[str, Any]]) -> GpuUse:
    """Read a trace's events."""
    work = sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in _ON_GPU and "dur" in e)
    busy, reached = 0.0, float("-inf")
    times: dict[str, list[float]] = defaultdict(list)
    for start, length, name in work:
        busy += max(0.0, start + length - max(start, reached))
        reached = max(reached, start + length)
        times[name].append(length)
    span = reached - work[0][0] if work else 0.0
    by_name = {name: (sum(some) / 1000, len(some)) for name, some in times.items()}
    return GpuUse(span / 1000, busy / 1000, dict(sorted(by_name.items(), key=lambda pair: -pair[1][0])))


def main() -> None:
    """Print what a file says."""
    parser = argparse.ArgumentParser(prog="python -m bench.trace", description="Read a trace of --profile-dir.")
    parser.add_argument("file", type=Path, help="steps-….json.gz")
    file = parser.parse_args().file
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as opened:
        use = gpu_use(json.load(opened)["traceEvents"])
    print(f"GPU busy {use.busy:.1f} of {use.span:.1f} ms: idle {use.idle_share:.1%}")
    for name, (taken, count) in list(use.by_name.items())[:_SHOWN]:
        print(f"{taken:10.2f} ms {count:7d} x  {name[:100]}")


if __name__ == "__main__":
    main()
