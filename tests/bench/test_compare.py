"""Two files of figures, side by side."""

from typing import Any

import pytest

from bench.compare import compare, figures
from bench.record import Record


def made(result: dict[str, Any], kind: str = "serve", server: Any = None, **settings: Any) -> Record:
    return Record(kind, "2030-01-02", "1.0", settings, server, result)


def rows(text: str) -> dict[str, list[str]]:
    """The table's, by name."""
    return {name: cells for name, *cells in (line.split() for line in text.split("\n\n")[1].splitlines()[1:])}


def test_figures_and_ratios() -> None:
    a = made({"requests": 2000, "errors": {"x": 2, "y": 1}, "ttft_ms": {"p50": 8.0}, "itl_ms": None, "zero": 0.0})
    b = made({"requests": 2000, "errors": {}, "ttft_ms": {"p50": 2.0}, "itl_ms": {"p50": 1.0}, "zero": 1.0})
    assert rows(compare(a, b)) == {
        "requests": ["2,000", "2,000", "1.000"],
        "errors": ["3", "0", "0.000"],
        "ttft_ms.p50": ["8.000", "2.000", "0.250"],
        "itl_ms.p50": ["-", "1.000", "-"],
        "zero": ["0.000", "1.000", "-"],
    }


def test_runs_of_sweeps_are_matched_by_their_load() -> None:
    a, b = (
        made({"points": [{"load": load, "summary": {"x": value}} for load, value in points]}, "sweep")
        for points in ([("1/s", 2.0), ("2/s", 4.0)], [("2/s", 8.0), ("3/s", 1.0)])
    )
    # The load's name has no space in these, so that the rows split well.
    assert rows(compare(a, b)) == {
        "points.1/s.summary.x": ["2.000", "-", "-"],
        "points.2/s.summary.x": ["4.000", "8.000", "2.000"],
        "points.3/s.summary.x": ["-", "1.000", "-"],
    }


def test_turns_are_numbered() -> None:
    assert dict(figures({"turns": [{"p50": 1.0}, None, {"p50": 3.0}]})) == {"turns.1.p50": 1.0, "turns.3.p50": 3.0}


def test_headings() -> None:
    server = {"model": "m", "version": {"version": "7"}}
    text = compare(made({}, seed=1, rate=2.0, turns=1), made({}, server=server, seed=2, turns=1))
    assert text.splitlines()[:5] == [
        "A: serve, 2030-01-02, the engine, version 1.0",
        "B: serve, 2030-01-02, model m, server: version 7",
        "settings that differ (A | B):",
        "  rate: 2.0 | -",
        "  seed: 1 | 2",
    ]
    assert "the same settings" in compare(made({}, seed=1), made({}, seed=1))


def test_different_kinds() -> None:
    with pytest.raises(ValueError, match="A is of `serve`, B of `sweep`"):
        compare(made({}), made({}, "sweep"))
