"""The command line of `python -m bench`."""

import argparse
import json
from pathlib import Path
from typing import Any

from bench.load import Size
from engine.args import EngineArgs
from server.args import add_flag

_MOST_RUNS = 100
_PLOTS = (".html", ".svg", ".png")


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    found = argparse.ArgumentParser(
        prog="python -m bench", description="Measure a server, or the engine alone; compare what was measured."
    )
    kinds = found.add_subparsers(dest="what", required=True)
    serve = kinds.add_parser("serve", help="load a server that speaks OpenAI's chat API")
    sweep = kinds.add_parser("sweep", help="the same with a load that grows from run to run")
    latency = kinds.add_parser("latency", help="time one batch in this process")
    throughput = kinds.add_parser("throughput", help="give the engine many requests in this process")
    compare = kinds.add_parser("compare", help="show two files of figures side by side")
    for kind in (serve, sweep):
        _add_requests(kind)
    _add_pace(serve)
    _add_paces(sweep)
    latency.add_argument("--batch-size", type=_positive, default=1, help="requests of a batch (default: 1)")
    latency.add_argument("--iterations", type=_positive, default=10, help="batches to time (default: 10)")
    latency.add_argument("--warmup", type=_count, default=2, help="batches before that (default: 2)")
    throughput.add_argument("--requests", type=_positive, default=64, help="given at once (default: 64)")
    for kind in (serve, sweep, latency, throughput):
        _add_load(kind)
    for kind in (latency, throughput):
        group = kind.add_argument_group("engine")
        for flag in EngineArgs.flags():
            add_flag(group, flag)
    compare.add_argument("files", nargs=2, type=Path, metavar="FILE", help="that --json of one command wrote")
    return found


def _add_requests(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--base-url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    kind.add_argument("--model", dest="served_model", metavar="NAME", help="default: the server's first")
    kind.add_argument("--api-key", dest="key", metavar="KEY", help="if the server wants one")
    kind.add_argument(
        "--requests", type=_positive, default=64, help="to measure in a run; conversations, with --turns (default: 64)"
    )
    kind.add_argument(
        "--turns", type=_positive, default=1, help="requests of a conversation, each with the answers before it"
    )
    kind.add_argument("--warmup", type=_count, default=4, help="requests before that (default: 4)")
    kind.add_argument("--seed", type=_count, default=0, help="of pictures, questions and arrivals (default: 0)")
    ends = kind.add_mutually_exclusive_group()
    ends.add_argument("--ignore-eos", action="store_true", help="make every answer --max-tokens long")
    ends.add_argument("--json-schema", type=_schema, metavar="FILE", help="of a schema that every answer has to fit")


def _add_pace(serve: argparse.ArgumentParser) -> None:
    pace = serve.add_mutually_exclusive_group()
    pace.add_argument(
        "--concurrency", type=_positive, default=16, help="requests, or conversations, at once (default: 16)"
    )
    pace.add_argument("--rate", type=_rate, help="so many begin in a second, at random times, instead")


def _add_paces(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument("--rates", type=rates, default=[], metavar="LIST", help="1,2,4 or FROM:TO:STEP, a second")
    sweep.add_argument("--concurrencies", type=concurrencies, default=[], metavar="LIST", help="1,2,4 or FROM:TO:STEP")
    sweep.add_argument(
        "--max-ttft-p95-ms", type=_rate, metavar="MS", help="end with the first run that is slower than this"
    )
    sweep.add_argument("--plot", type=_plot, metavar="FILE", help="a page (.html) or picture (.svg, .png) of all runs")


def _add_load(kind: argparse.ArgumentParser) -> None:
    kind.add_argument(
        "--image", type=image_sizes, default="640x480", metavar="LIST",
        help="sizes of pictures, such as 640x480,1280x720,none, of which each request draws one (default: 640x480)",
    )  # fmt: skip
    kind.add_argument("--images", type=_positive, default=1, help="in each request that has any (default: 1)")
    kind.add_argument(
        "--same-image", action="store_true", help="show one picture, or one of each size, in all requests"
    )
    kind.add_argument("--prompt-words", type=_positive, default=32, help="of each question (default: 32)")
    kind.add_argument("--max-tokens", type=_positive, default=128, help="of each answer (default: 128)")
    kind.add_argument("--json", type=_output, metavar="FILE", help="to write the figures to")


def image_sizes(given: str) -> tuple[Size, ...]:
    """`640x480,none` and the like."""
    return tuple(_image_size(one) for one in given.split(","))


def _image_size(given: str) -> Size:
    if given == "none":
        return None
    width, times, height = given.partition("x")
    if not (times and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{given!r} is no size such as 640x480, nor none")
    return int(width), int(height)


def rates(given: str) -> list[float]:
    """`0.5,1,2:10:2` and the like, in order."""
    found: set[float] = set()
    for part in given.split(","):
        first, *rest = (_rate(number) for number in part.split(":"))
        if not rest:
            found.add(first)
            continue
        if len(rest) != 2 or rest[0] < first:
            raise argparse.ArgumentTypeError(f"{part!r} is no range FROM:TO:STEP")
        last, step = rest
        if last - first >= _MOST_RUNS * step:
            raise argparse.ArgumentTypeError(f"{part!r} means more than {_MOST_RUNS} runs")
        # The small share is for steps that a binary number does not meet, such as 0.1.
        found |= {round(first + number * step, 9) for number in range(int((last - first) / step + 1e-6) + 1)}
    return sorted(found)


def concurrencies(given: str) -> list[int]:
    """The same of whole numbers."""
    return sorted(_positive(f"{number:g}") for number in rates(given))


def _rate(given: str) -> float:
    try:
        rate = float(given)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{given!r} is no number above 0")
    return rate


def _positive(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is no whole number of at least 1")
    return int(given)


def _count(given: str) -> int:
    if not given.isdecimal():
        raise argparse.ArgumentTypeError(f"{given!r} is no whole number of at least 0")
    return int(given)


def _output(given: str) -> Path:
    """Seen to before anything is measured, which may take an hour."""
    path = Path(given)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{given!r} is no file in a folder that exists")
    return path


def _plot(given: str) -> Path:
    path = _output(given)
    if path.suffix not in _PLOTS:
        raise argparse.ArgumentTypeError(f"{given!r} does not end in {', '.join(_PLOTS)}")
    return path


def _schema(given: str) -> dict[str, Any]:
    try:
        schema = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{given!r} cannot be read: {error}") from error
    if not isinstance(schema, dict):
        raise argparse.ArgumentTypeError(f"{given!r} holds no JSON object")
    return schema
