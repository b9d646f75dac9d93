"""What the command line takes, and what it says of the rest."""

import argparse
from pathlib import Path

import pytest

from bench.arguments import concurrencies, image_sizes, parser, rates


def test_image_sizes() -> None:
    assert image_sizes("640x480") == ((640, 480),)
    assert image_sizes("640x480,none,1x2") == ((640, 480), None, (1, 2))


@pytest.mark.parametrize("bad", ["640", "0x5", "ax5", "1x2x3", "", "640x480,", "-1x5", "640x"])
def test_no_image_sizes(bad: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size such as 640x480, nor none"):
        image_sizes(bad)


def test_lists_and_ranges() -> None:
    assert rates("4,0.5,1") == [0.5, 1.0, 4.0]
    assert rates("0.1:0.5:0.1") == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert rates("2:9:3,5,20") == [2.0, 5.0, 8.0, 20.0]
    assert concurrencies("1,4:12:4") == [1, 4, 8, 12]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "'' is no number above 0"),
        ("0", "'0' is no number above 0"),
        ("nan", "'nan' is no number above 0"),
        ("inf", "'inf' is no number above 0"),
        ("1,x", "'x' is no number above 0"),
        ("1:2", "'1:2' is no range FROM:TO:STEP"),
        ("3:2:1", "'3:2:1' is no range FROM:TO:STEP"),
        ("1:2:0", "'0' is no number above 0"),
        ("1:1e9:1", "'1:1e9:1' means more than 100 runs"),
    ],
)
def test_no_rates(bad: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        rates(bad)
    assert str(raised.value) == message


def test_half_a_request_at_once() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'1.5' is no whole number"):
        concurrencies("1,1.5")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--rate", "1", "--concurrency", "2"], "not allowed with argument"),
        (["serve", "--json", "/nowhere/at/all.json"], "is no file in a folder that exists"),
        (["serve", "--json", "/"], "is no file in a folder that exists"),
        (["sweep", "--plot", "figures.pdf"], "does not end in .html, .svg, .png"),
        (["serve", "--requests", "0"], "'0' is no whole number of at least 1"),
        (["serve", "--warmup", "-1"], "'-1' is no whole number of at least 0"),
        (["serve", "--json-schema", "/nowhere"], "cannot be read"),
        (["compare", "one.json"], "FILE"),
    ],
)
def test_refused_before_anything_is_measured(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        parser().parse_args(words)
    assert raised.value.code == 2 and message in capsys.readouterr().err


def test_taken(tmp_path: Path) -> None:
    plot = tmp_path / "page.html"
    found = parser().parse_args(["sweep", "--rates", "1,2", "--image", "none", "--plot", str(plot)])
    assert (found.rates, found.concurrencies, found.image, found.plot) == ([1.0, 2.0], [], (None,), plot)
