"""`python -m bench serve | latency | throughput`: measure a server, or the engine alone."""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from bench.load import Load, image_size
from bench.report import show, table, write_json
from engine.args import EngineArgs
from server.args import add_flag, with_dashes


def main() -> None:
    """Measure and print."""
    args = _parser().parse_args([with_dashes(word) for word in sys.argv[1:]])
    load = Load(args.image, args.images, args.same_image, args.prompt_words, args.seed)
    try:
        result = _serve(args, load) if args.what == "serve" else _offline(args, load)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.json is not None:
        settings = {name: str(value) for name, value in vars(args).items() if value is not None}
        write_json(args.json, result, settings)


def _serve(args: argparse.Namespace, load: Load) -> Any:
    try:
        from bench.serve import ServeSettings, measure
    except ModuleNotFoundError as error:
        raise RuntimeError(f"`serve` takes {error.name}: python -m pip install {error.name}") from error
    settings = ServeSettings(
        base_url=args.base_url,
        model=args.served_model,
        api_key=args.key,
        load=load,
        requests=args.requests,
        warmup=args.warmup,
        concurrency=args.concurrency,
        rate=args.rate,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        schema=args.json_schema,
    )
    summary = asyncio.run(measure(settings))
    print(show(summary))
    return summary


def _offline(args: argparse.Namespace, load: Load) -> Any:
    from bench.offline import measure_latency, measure_throughput
    from engine import LLM

    llm = LLM(**{flag.name: getattr(args, flag.name) for flag in EngineArgs.flags()})
    if args.what == "latency":
        latency = measure_latency(
            llm, load, batch_size=args.batch_size, max_tokens=args.max_tokens, iterations=args.iterations,
            warmup=args.warmup,
        )  # fmt: skip
        print(table({"batch": latency.batch_ms}))
        print(f"{latency.ms_per_token:.2f} ms for each token of an answer, batch size {latency.batch_size}")
        return latency
    found = measure_throughput(llm, load, requests=args.requests, max_tokens=args.max_tokens)
    print(
        f"{found.requests} requests in {found.duration_s:.2f} s: {found.requests_per_s:.2f} requests/s, "
        f"{found.output_tokens_per_s:.1f} output tokens/s, {found.total_tokens_per_s:.1f} tokens/s in all"
    )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    serve = kinds.add_parser("serve", help="load a server that speaks OpenAI's chat API")
    serve.add_argument("--base-url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    serve.add_argument("--model", dest="served_model", metavar="NAME", help="default: the server's first")
    serve.add_argument("--api-key", dest="key", metavar="KEY", help="if the server wants one")
    serve.add_argument("--requests", type=_positive, default=64, help="to measure (default: 64)")
    serve.add_argument("--warmup", type=int, default=4, help="requests before that (default: 4)")
    serve.add_argument("--concurrency", type=_positive, default=16, help="requests at once (default: 16)")
    serve.add_argument("--rate", type=float, help="requests a second, at random times, instead of --concurrency")
    ends = serve.add_mutually_exclusive_group()
    ends.add_argument("--ignore-eos", action="store_true", help="make every answer --max-tokens long")
    ends.add_argument("--json-schema", type=_schema, metavar="FILE", help="of a schema that every answer has to fit")
    latency = kinds.add_parser("latency", help="time one batch in this process")
    latency.add_argument("--batch-size", type=_positive, default=1, help="requests of a batch (default: 1)")
    latency.add_argument("--iterations", type=_positive, default=10, help="batches to time (default: 10)")
    latency.add_argument("--warmup", type=int, default=2, help="batches before that (default: 2)")
    throughput = kinds.add_parser("throughput", help="give the engine many requests in this process")
    throughput.add_argument("--requests", type=_positive, default=64, help="given at once (default: 64)")
    for kind in (serve, latency, throughput):
        kind.add_argument(
            "--image", type=image_size, default="640x480", metavar="WxH", help="or none (default: 640x480)"
        )
        kind.add_argument("--images", type=_positive, default=1, help="in each request (default: 1)")
        kind.add_argument("--same-image", action="store_true", help="show one picture in all requests")
        kind.add_argument("--prompt-words", type=_positive, default=32, help="of each question (default: 32)")
        kind.add_argument("--max-tokens", type=_positive, default=128, help="of each answer (default: 128)")
        kind.add_argument("--json", type=Path, help="file for the figures")
    for kind in (latency, throughput):
        group = kind.add_argument_group("engine")
        for flag in EngineArgs.flags():
            add_flag(group, flag)
    serve.add_argument("--seed", type=int, default=0, help="of pictures, questions and arrivals (default: 0)")
    return parser


def _schema(given: str) -> dict[str, Any]:
    try:
        schema = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{given!r} cannot be read: {error}") from error
    if not isinstance(schema, dict):
        raise argparse.ArgumentTypeError(f"{given!r} holds no JSON object")
    return schema


def _positive(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is no whole number of at least 1")
    return int(given)


if __name__ == "__main__":
    main()
