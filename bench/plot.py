"""Draws a sweep: throughput against waiting, as a picture or as a page that needs no network."""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from bench.record import Record
from bench.report import remarks
from bench.sweep import COLUMNS, Point, cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"p50": "#2a78b5", "p95": "#e08a1e", "p99": "#b5332a"}
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 2rem; }}
td, th {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }}
.settings td, .settings th {{ text-align: left; font-weight: normal; }}
</style>
<h1>{title}</h1>
{figure}
<table>
{rows}
</table>
{remarks}
<table class="settings">
{settings}
</table>
</html>
"""


def check() -> None:
    """See before the first run that its figures can be drawn.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise RuntimeError("`--plot` takes matplotlib: python -m pip install '.[bench]'") from error


def write(path: Path, record: Record) -> None:
    """Draw a sweep as a page (`.html`), or as the picture that the file's name asks for."""
    figure = draw(record.result.points)
    if path.suffix == ".html":
        path.write_text(page(figure, record), encoding="utf-8")
    else:
        figure.savefig(path, dpi=150)


def draw(points: Sequence[Point]) -> "Figure":
    """Waiting for the first token on the left, for each further one on the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    first, further = figure.subplots(1, 2)
    _lines(first, points, "ttft_ms", "time to first token (TTFT)")
    _lines(further, points, "tpot_ms", "time per output token (TPOT)")
    first.set_yscale("log")  # where the server cannot keep up it grows without end, and would hide all the rest
    for set_formatter in (first.yaxis.set_major_formatter, first.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(2, 0.4)))  # 200 instead of a power of ten
    return figure


def _lines(axes: "Axes", points: Sequence[Point], name: str, title: str) -> None:
    series = {"rates": [p for p in points if p.rate is not None], "concurrencies": [p for p in points if p.concurrency]}
    for (kind, members), style in zip(series.items(), ("o-", "s--"), strict=True):
        drawn = [(p, spread) for p in members if (spread := getattr(p.summary, name)) is not None]
        for percentile, color in _COLORS.items() if drawn else ():
            across = [p.summary.requests_per_s for p, _ in drawn]
            up = [getattr(spread, percentile) for _, spread in drawn]
            axes.plot(across, up, style, color=color, label=f"{percentile}, {kind}")
        for point, spread in drawn:
            at = (point.summary.requests_per_s, spread.p50)
            axes.annotate(point.load, at, xytext=(4, -12), textcoords="offset points", fontsize=8)
    axes.set(title=title, xlabel="completed requests/s", ylabel="ms")
    axes.grid(alpha=0.3)
    axes.margins(x=0.1)
    if axes.lines:
        axes.legend()


def page(figure: "Figure", record: Record) -> str:
    """All in one file."""
    points: list[Point] = record.result.points
    about = {"date": record.date, "measured": record.origin, "bench": record.program, **record.settings}
    said = [f"{point.load}: {remark}" for point in points for remark in remarks(point.summary)]
    return _PAGE.format(
        title=escape(f"Load sweep of {(record.server or {}).get('model', 'a model')}"),
        figure=_svg(figure),
        rows="\n".join([_row("th", COLUMNS), *(_row("td", cells(point)) for point in points)]),
        remarks="\n".join(f"<p>{escape(remark)}</p>" for remark in said),
        settings="\n".join(_row("td", (name, str(value))) for name, value in about.items()),
    )


def _svg(figure: "Figure") -> str:
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # text stays text: smaller, and found by a search
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    written = file.getvalue()
    return written[written.index("<svg") :]


def _row(tag: str, row: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"
