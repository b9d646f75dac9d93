"""Sweeps as pictures and pages."""

import re
from pathlib import Path

import pytest
from PIL import Image

from bench import plot
from bench.record import Record, new
from bench.report import Spread, Summary
from bench.sweep import Point, Sweep


def summary(requests_per_s: float, first: float, errors: dict[str, int] | None = None) -> Summary:
    ttft = Spread(first, first, 2 * first, 3 * first)
    return Summary(9, 9, errors or {}, 0, 1.0, requests_per_s, 77.7, 5.0, 0.1, ttft, ttft, ttft, ttft, [])


NOTHING = Summary(9, 0, {"<b>gone</b>": 9}, 0, 1.0, 0.0, 0.0, 0.0, 0.1, None, None, None, None, [])
POINTS = [
    Point("1/s", 1.0, None, summary(0.9, 30.0)),
    Point("2/s", 2.0, None, summary(1.7, 500.0)),
    Point("3/s", 3.0, None, NOTHING),
    Point("4 at once", None, 4, summary(1.5, 90.0)),
]


@pytest.fixture
def record() -> Record:
    return new("sweep", {"seed": 3}, Sweep(POINTS), {"model": "<m>", "version": {"version": "7"}})


def test_lines() -> None:
    """Of each kind of load those percentiles that there are, over what got through."""
    first, further = plot.draw(POINTS).axes
    for axes in (first, further):
        found = {str(line.get_label()): line.get_xydata().tolist() for line in axes.lines}  # type: ignore[union-attr]
        assert found == {
            "p50, rates": [[0.9, 30.0], [1.7, 500.0]],
            "p95, rates": [[0.9, 60.0], [1.7, 1000.0]],
            "p99, rates": [[0.9, 90.0], [1.7, 1500.0]],
            "p50, concurrencies": [[1.5, 90.0]],
            "p95, concurrencies": [[1.5, 180.0]],
            "p99, concurrencies": [[1.5, 270.0]],
        }
        assert [text.get_text() for text in axes.texts] == ["1/s", "2/s", "4 at once"]


def test_page(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "sweep.html"
    plot.write(file, record)
    page = file.read_text()
    for text in ("<svg", "time to first token", "p99, rates", "<td>77.7</td>", "<td>seed</td><td>3</td>", "version 7"):
        assert text in page
    assert "&lt;m&gt;" in page and "<m>" not in page
    assert "3/s: 9 times: &lt;b&gt;gone&lt;/b&gt;" in page and "<b>" not in page


def test_a_page_needs_no_network(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "sweep.html"
    plot.write(file, record)
    page = file.read_text()
    assert set(re.findall(r"https?://[^\"]*", page)) == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert all(link.startswith("#") for link in re.findall(r"(?:href|src)=\"([^\"]*)", page))
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)", page)) and "@import" not in page


def test_pictures(record: Record, tmp_path: Path) -> None:
    plot.write(tmp_path / "sweep.png", record)
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.format == "PNG" and image.width > 1000
    plot.write(tmp_path / "sweep.svg", record)
    assert "<svg" in (tmp_path / "sweep.svg").read_text()


def test_nothing_to_draw(tmp_path: Path) -> None:
    plot.write(tmp_path / "sweep.html", new("sweep", {}, Sweep([POINTS[2]])))
    assert "<td>3/s</td>" in (tmp_path / "sweep.html").read_text()
