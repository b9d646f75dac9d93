"""`python -m bench serve | sweep | latency | throughput | compare`: measure a server, or the engine alone."""

import argparse
import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING

from bench import record
from bench.arguments import parser
from bench.compare import compare
from bench.load import Load, size_name
from bench.record import Record
from bench.report import show, table
from engine.args import EngineArgs
from server.args import with_dashes

if TYPE_CHECKING:
    from bench.serve import ServeSettings

_NOT_SETTINGS = ("what", "json", "plot", "key", "files")


def main() -> None:
    """Measure and print."""
    arguments = parser()
    args = arguments.parse_args([with_dashes(word) for word in sys.argv[1:]])
    if args.what == "sweep" and not args.rates and not args.concurrencies:
        arguments.error("sweep takes --rates, --concurrencies or both")
    try:
        if args.what == "compare":
            print(compare(*map(record.read, args.files)))
        else:
            _measure(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


def _measure(args: argparse.Namespace) -> None:
    if args.what in ("latency", "throughput"):
        found, text = _offline(args)
    else:
        try:
            found, text = asyncio.run(_serve(args) if args.what == "serve" else _sweep(args))
        except ModuleNotFoundError as error:
            raise RuntimeError(f"`{args.what}` takes {error.name}: python -m pip install '.[bench]'") from error
    # What was measured is kept before it is shown, which fails where nobody reads on.
    if args.json is not None:
        record.write(args.json, found)
    if args.what == "sweep" and args.plot is not None:
        from bench import plot

        plot.write(args.plot, found)
    print(text)
    if args.what == "serve" and not found.result.completed:
        raise RuntimeError("no request was completed")


def _settings(args: argparse.Namespace) -> dict[str, object]:
    """Without the key, which is nobody's business."""
    found = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS and value is not None}
    return {**found, "image": ",".join(map(size_name, args.image))}


def _load(args: argparse.Namespace) -> Load:
    return Load(args.image, args.images, args.same_image, args.prompt_words, args.seed)


async def _serve(args: argparse.Namespace) -> tuple[Record, str]:
    from bench.serve import Pace, measure, warm_up
    from bench.target import connect

    settings, pace = _asked(args), Pace(args.concurrency, args.rate)
    async with connect(args.base_url, model=args.served_model, api_key=args.key) as target:
        await warm_up(target, settings, pace.concurrency)
        summary = await measure(target, settings, pace)
    return record.new("serve", _settings(args), summary, target.described()), show(summary)


async def _sweep(args: argparse.Namespace) -> tuple[Record, str]:
    from bench import plot
    from bench.serve import Pace, warm_up
    from bench.sweep import COLUMNS, Sweep, line, sweep
    from bench.sweep import show as show_point
    from bench.target import connect

    if args.plot is not None:
        plot.check()
    settings, points = _asked(args), []
    series = [[Pace(rate=rate) for rate in args.rates], [Pace(concurrency) for concurrency in args.concurrencies]]
    async with connect(args.base_url, model=args.served_model, api_key=args.key) as target:
        await warm_up(target, settings, max(args.concurrencies, default=Pace().concurrency))
        print(line(COLUMNS))
        with contextlib.suppress(asyncio.CancelledError):  # by Ctrl-C: what was measured is kept
            async for point in sweep(target, settings, series, args.max_ttft_p95_ms):
                print(show_point(point), flush=True)
                points.append(point)
    left = len(args.rates) + len(args.concurrencies) - len(points)
    text = (
        f"{left} loads were left out: the server did not keep up, or it was interrupted"
        if left
        else "all loads were measured"
    )
    return record.new("sweep", _settings(args), Sweep(points), target.described()), text


def _asked(args: argparse.Namespace) -> "ServeSettings":
    from bench.serve import ServeSettings

    return ServeSettings(
        load=_load(args),
        requests=args.requests,
        turns=args.turns,
        warmup=args.warmup,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        schema=args.json_schema,
    )


def _offline(args: argparse.Namespace) -> tuple[Record, str]:
    from bench.offline import measure_latency, measure_throughput
    from engine import LLM

    llm, load = LLM(**{flag.name: getattr(args, flag.name) for flag in EngineArgs.flags()}), _load(args)
    if args.what == "latency":
        latency = measure_latency(
            llm, load, batch_size=args.batch_size, max_tokens=args.max_tokens, iterations=args.iterations,
            warmup=args.warmup,
        )  # fmt: skip
        text = f"{latency.ms_per_token:.2f} ms for each token of an answer, batch size {latency.batch_size}"
        return record.new("latency", _settings(args), latency), f"{table({'batch': latency.batch_ms})}\n{text}"
    found = measure_throughput(llm, load, requests=args.requests, max_tokens=args.max_tokens)
    text = (
        f"{found.requests} requests in {found.duration_s:.2f} s: {found.requests_per_s:.2f} requests/s, "
        f"{found.output_tokens_per_s:.1f} output tokens/s, {found.total_tokens_per_s:.1f} tokens/s in all"
    )
    return record.new("throughput", _settings(args), found), text


if __name__ == "__main__":
    main()
