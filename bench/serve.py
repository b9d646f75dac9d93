"""Measures a server through its chat API, any that speaks OpenAI's."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from bench.load import Load, messages
from bench.report import Exchange, Summary, outcome, summarize

_WARM_UP, _MEASURED = 1, 2

Post = Callable[[bytes], Awaitable[Exchange]]


@dataclass(slots=True)
class ServeSettings:
    """A run."""

    base_url: str
    model: str | None = None
    """None: the server's first."""
    api_key: str | None = None
    load: Load = field(default_factory=Load)
    requests: int = 64
    warmup: int = 4
    concurrency: int = 16
    """Requests on their way at once, unless `rate` is given."""
    rate: float | None = None
    """Requests a second, arriving at random (Poisson)."""
    max_tokens: int = 128
    ignore_eos: bool = False
    """Whether every answer must have `max_tokens` tokens."""
    schema: dict[str, Any] | None = None
    """A JSON schema that every answer has to fit."""
    timeout_s: float = 600.0


async def measure(settings: ServeSettings) -> Summary:
    """Warm up and measure.

    All bodies are built before the clock starts; while it runs the client only notes when bytes arrive.

    Raises:
        RuntimeError: the server does not answer, or refuses the warm-up.
    """
    headers = {"Content-Type": "application/json"}
    if settings.api_key:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=timeout, read_bufsize=1 << 20
    ) as session:
        url = settings.base_url.rstrip("/").removesuffix("/v1") + "/v1"
        model = settings.model or await _first_model(session, url)

        async def post(body: bytes) -> Exchange:
            return await _send(session, f"{url}/chat/completions", body)

        warm_up = await asyncio.to_thread(_bodies, settings, model, _WARM_UP, settings.warmup)
        bodies = await asyncio.to_thread(_bodies, settings, model, _MEASURED, settings.requests)
        for exchange in await _closed_loop(post, warm_up, settings.concurrency, "Warming up"):
            if error := outcome(exchange).error:
                raise RuntimeError(f"the warm-up failed: {error}")
        cpu = time.process_time()
        if settings.rate is None:
            exchanges = await _closed_loop(post, bodies, settings.concurrency, "Measuring")
        else:
            exchanges = await _open_loop(post, bodies, settings.rate, settings.load.seed)
        cpu = time.process_time() - cpu
    return summarize(exchanges, cpu, settings.max_tokens if settings.ignore_eos else None)


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(f"{url}/models") as response:
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, KeyError, IndexError, TypeError) as error:
        raise RuntimeError(f"{url}/models does not name a model ({error}): give --model") from error


def _bodies(settings: ServeSettings, model: str, part: int, count: int) -> list[bytes]:
    common: dict[str, Any] = {
        "model": model, "max_tokens": settings.max_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if settings.ignore_eos:
        common |= {"ignore_eos": True, "min_tokens": settings.max_tokens}

    if settings.schema is not None:
        described = {"name": "answer", "strict": True, "schema": settings.schema}
        common["response_format"] = {"type": "json_schema", "json_schema": described}

    def build(index: int) -> bytes:
        return json.dumps({**common, "messages": messages(settings.load, part, index)}).encode()

    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(build, range(count)), total=count, desc="Building requests", disable=None))


async def _send(session: aiohttp.ClientSession, url: str, body: bytes) -> Exchange:
    exchange = Exchange(started=time.perf_counter())
    try:
        async with session.post(url, data=body) as response:
            exchange.status = response.status
            async for data in response.content.iter_any():
                exchange.reads.append((time.perf_counter(), data))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        exchange.failure = f"{type(error).__name__}: {error}"
    exchange.ended = time.perf_counter()
    return exchange


async def _closed_loop(post: Post, bodies: list[bytes], concurrency: int, name: str) -> list[Exchange]:
    """Keep so many on their way until all are answered."""
    waiting = iter(enumerate(bodies))
    found: dict[int, Exchange] = {}
    with tqdm(total=len(bodies), desc=name, unit="request", disable=None) as progress:

        async def work() -> None:
            for index, body in waiting:
                found[index] = await post(body)
                progress.update()

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return [found[index] for index in range(len(bodies))]


async def _open_loop(post: Post, bodies: list[bytes], rate: float, seed: int) -> list[Exchange]:
    """Send each at its time, whatever has become of those before."""
    times = np.cumsum(np.random.default_rng((seed, 3)).exponential(1 / rate, len(bodies)))
    begun = time.perf_counter()
    with tqdm(total=len(bodies), desc="Measuring", unit="request", disable=None) as progress:

        async def work(due: float, body: bytes) -> Exchange:
            await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
            exchange = await post(body)
            progress.update()
            return exchange

        return list(await asyncio.gather(*(work(float(due), body) for due, body in zip(times, bodies, strict=True))))
