"""Idle time of a GPU, from events worked out by hand."""

import pytest

from bench.trace import gpu_use


def event(start: float, length: float, name: str, cat: str = "kernel") -> dict[str, object]:
    return {"ts": start, "dur": length, "name": name, "cat": cat, "ph": "X"}


def test_overlaps_count_once() -> None:
    events = [
        event(2000, 1000, "b"), event(0, 1000, "a"), event(500, 1000, "b", "gpu_memcpy"), event(2100, 100, "a"),
        event(0, 99999, "host", "cpu_op"), {"name": "no duration", "cat": "kernel", "ts": 5},
    ]  # fmt: skip
    use = gpu_use(events)
    assert (use.span, use.busy) == (3.0, 2.5)
    assert use.idle_share == pytest.approx(1 / 6)
    assert list(use.by_name.items()) == [("b", (2.0, 2)), ("a", (1.1, 2))]


def test_nothing_ran() -> None:
    use = gpu_use([event(0, 5, "host", "cpu_op")])
    assert (use.span, use.busy, use.idle_share, use.by_name) == (0.0, 0.0, 0.0, {})
