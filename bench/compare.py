"""Two files of figures, side by side."""

from collections.abc import Iterator
from typing import Any

from bench.record import Record

_MISSING = "-"


def compare(a: Record, b: Record) -> str:
    """A table of every figure, with B's ratio to A's.

    Raises:
        ValueError: they are of different kinds.
    """
    if a.kind != b.kind:
        raise ValueError(f"A is of `{a.kind}`, B of `{b.kind}`: their figures mean different things")
    return "\n".join([*_headings(a, b), "", *_rows(dict(figures(a.result)), dict(figures(b.result)))])


def figures(result: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers, under the names that lead to them; of errors only how many there were."""
    if isinstance(result, dict) and name.rpartition(".")[2] == "errors":
        yield name, sum(result.values())
    elif isinstance(result, dict):
        for key, value in result.items():
            yield from figures(value, f"{name}.{key}" if name else key)
    elif isinstance(result, list):
        for number, value in enumerate(result, start=1):
            label = value.get("load", number) if isinstance(value, dict) else number
            yield from figures(value, f"{name}.{label}")
    elif isinstance(result, int | float):
        yield name, result


def _headings(a: Record, b: Record) -> list[str]:
    lines = [f"{name}: {one.kind}, {one.date}, {one.origin}" for name, one in (("A", a), ("B", b))]
    different = [
        f"  {name}: {a.settings.get(name, _MISSING)} | {b.settings.get(name, _MISSING)}"
        for name in sorted(a.settings.keys() | b.settings.keys())
        if a.settings.get(name) != b.settings.get(name)
    ]
    return [*lines, "settings that differ (A | B):" if different else "the same settings", *different]


def _rows(a: dict[str, float], b: dict[str, float]) -> Iterator[str]:
    names = list(dict.fromkeys([*a, *b]))
    width = max(map(len, names), default=0) + 2
    yield f"{'':{width}}{'A':>14}{'B':>14}{'B/A':>9}"
    for name in names:
        left, right = a.get(name), b.get(name)
        yield f"{name:{width}}{_number(left):>14}{_number(right):>14}{_ratio(left, right):>9}"


def _number(value: float | None) -> str:
    if value is None:
        return _MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _ratio(a: float | None, b: float | None) -> str:
    return _MISSING if a is None or b is None or a == 0 else f"{b / a:.3f}"
