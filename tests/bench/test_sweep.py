"""Runs of growing load."""

import json
from typing import Any

from bench.load import Load
from bench.serve import Pace, ServeSettings
from bench.sweep import COLUMNS, Point, cells, line, show, sweep
from tests.bench.fake import Fake

SERIES = ([Pace(rate=20.0), Pace(rate=60.0)], [Pace(1), Pace(2), Pace(4)])
SETTINGS = ServeSettings(Load(sizes=((16, 16), None), prompt_words=4), requests=6)


async def run(fake: Fake, max_ttft_p95_ms: float | None = None) -> list[Point]:
    async with fake.target() as target:
        return [point async for point in sweep(target, SETTINGS, SERIES, max_ttft_p95_ms)]


def shape(body: dict[str, Any]) -> int:
    """How many parts the question has: two with a picture."""
    return len(body["messages"][0]["content"])


async def test_all_runs() -> None:
    fake = Fake()
    points = await run(fake)
    assert [point.load for point in points] == ["20/s", "60/s", "1 at once", "2 at once", "4 at once"]
    assert [(point.rate, point.concurrency) for point in points] == [
        (20.0, None), (60.0, None), (None, 1), (None, 2), (None, 4),
    ]  # fmt: skip
    assert all(point.summary.completed == 6 for point in points)
    runs = [fake.asked[start : start + 6] for start in range(0, 30, 6)]
    shapes = [sorted(map(shape, bodies)) for bodies in runs]
    assert all(found == shapes[0] for found in shapes) and set(shapes[0]) == {1, 2}
    assert len({json.dumps(body["messages"]) for body in fake.asked}) == 30, "a later run finds nothing in a cache"


async def test_a_series_ends_where_it_is_too_slow() -> None:
    points = await run(Fake(wait_s=0.05), max_ttft_p95_ms=20.0)
    assert [point.load for point in points] == ["20/s", "1 at once"]
    points = await run(Fake(), max_ttft_p95_ms=60_000.0)
    assert len(points) == 5


async def test_a_series_ends_where_nothing_is_answered() -> None:
    points = await run(Fake(fail_in_turn=0))
    assert [point.load for point in points] == ["20/s", "1 at once"]
    row = dict(zip(("load", "rate", "tokens", "p50"), cells(points[0]), strict=False))
    assert row == {"load": "20/s", "rate": "0.00", "tokens": "0.0", "p50": "-"} and cells(points[0])[9] == "6"
    assert "    6 times: status 500: broken" in show(points[0])


async def test_rows() -> None:
    (point, *_) = await run(Fake())
    found, ttft, tpot = point.summary, point.summary.ttft_ms, point.summary.tpot_ms
    assert ttft is not None and tpot is not None
    wanted = [
        found.requests_per_s,
        found.output_tokens_per_s,
        ttft.p50,
        ttft.p95,
        ttft.p99,
        tpot.p50,
        tpot.p95,
        tpot.p99,
    ]
    written = cells(point)
    assert [float(cell) for cell in written[1:9]] == [
        round(value, 2 if i == 0 else 1) for i, value in enumerate(wanted)
    ]
    assert len(written) == len(COLUMNS) and len(line(written)) == len(line(COLUMNS))
