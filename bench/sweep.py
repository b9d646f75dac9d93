"""Runs of growing load: how much a server gets through, and what its clients wait for that."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import count

from bench.report import Spread, Summary, remarks
from bench.serve import MEASURED, Pace, ServeSettings, measure
from bench.target import Target

COLUMNS = (
    "load", "requests/s", "output tok/s", "TTFT ms p50", "p95", "p99", "TPOT ms p50", "p95", "p99", "errors", "client",
)  # fmt: skip
_WIDTHS = (12, 12, 14, 13, 9, 9, 13, 9, 9, 8, 8)


@dataclass(frozen=True, slots=True)
class Point:
    """One run."""

    load: str
    rate: float | None
    concurrency: int | None
    summary: Summary


@dataclass(frozen=True, slots=True)
class Sweep:
    """All runs, in the order in which they were made."""

    points: list[Point]


async def sweep(
    target: Target, settings: ServeSettings, series: Sequence[Sequence[Pace]], max_ttft_p95_ms: float | None = None
) -> AsyncIterator[Point]:
    """Make one run after the other; a series ends early where the server cannot keep up.

    All runs have the same sizes, lengths and arrivals (in proportion), but other words and pictures: with the same ones
    a run would find those of the run before in the server's caches.
    """
    parts = count(MEASURED)
    for paces in series:
        for pace in paces:
            summary = await measure(target, settings, pace, next(parts))
            concurrency = pace.concurrency if pace.rate is None else None
            yield Point(str(pace), pace.rate, concurrency, summary)
            if _too_much(summary, max_ttft_p95_ms):
                break


def _too_much(summary: Summary, max_ttft_p95_ms: float | None) -> bool:
    if summary.ttft_ms is None:
        return True
    return max_ttft_p95_ms is not None and summary.ttft_ms.p95 > max_ttft_p95_ms


def cells(point: Point) -> list[str]:
    """A point as a row of `COLUMNS`."""
    found = point.summary
    return [
        point.load, f"{found.requests_per_s:.2f}", f"{found.output_tokens_per_s:.1f}", *_percentiles(found.ttft_ms),
        *_percentiles(found.tpot_ms), str(sum(found.errors.values())), f"{found.client_busy:.0%}",
    ]  # fmt: skip


def _percentiles(spread: Spread | None) -> list[str]:
    return ["-"] * 3 if spread is None else [f"{value:.1f}" for value in (spread.p50, spread.p95, spread.p99)]


def line(row: Sequence[str]) -> str:
    """A row of the table as text."""
    return "".join(f"{cell:>{width}}" for cell, width in zip(row, _WIDTHS, strict=True))


def show(point: Point) -> str:
    """A point for people."""
    return "\n".join([line(cells(point)), *(f"    {remark}" for remark in remarks(point.summary))])
