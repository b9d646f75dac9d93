"""Puts a load on a server and measures how it bears it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.conversation import Conversation, conversations, follow_up
from bench.load import Load
from bench.report import Exchange, Summary, outcome, summarize
from bench.target import Target

WARM_UP, MEASURED = 1, 2
"""Parts of the load."""

Post = Callable[[bytes], Awaitable[Exchange]]


@dataclass(frozen=True, slots=True)
class Pace:
    """When conversations begin."""

    concurrency: int = 16
    """As many at once, unless `rate` is given."""
    rate: float | None = None
    """So many a second, at random times (Poisson)."""

    def __str__(self) -> str:
        """For tables."""
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g}/s"


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What is asked in a run."""

    load: Load = field(default_factory=Load)
    requests: int = 64
    """Conversations, if they have several turns."""
    turns: int = 1
    """Requests of a conversation, each with the answers before it."""
    warmup: int = 4
    max_tokens: int = 128
    ignore_eos: bool = False
    """Whether every answer must have `max_tokens` tokens."""
    schema: dict[str, Any] | None = None
    """A JSON schema that every answer has to fit."""


async def warm_up(target: Target, settings: ServeSettings, concurrency: int) -> None:
    """Send what is not measured.

    Raises:
        RuntimeError: the server refuses it.
    """
    talks = await _build(target, settings, WARM_UP, settings.warmup)
    for exchange in await _closed_loop(target.post, talks, concurrency, "Warming up"):
        if error := outcome(exchange).error:
            raise RuntimeError(f"the warm-up failed: {error}")


async def measure(target: Target, settings: ServeSettings, pace: Pace, part: int = MEASURED) -> Summary:
    """Put the load on the server.

    What is known before the answers is built before the clock starts; while it runs the client only notes when bytes
    arrive, and reads an answer if the next turn needs it.
    """
    talks = await _build(target, settings, part, settings.requests)
    cpu = time.process_time()
    if pace.rate is None:
        exchanges = await _closed_loop(target.post, talks, pace.concurrency, "Measuring")
    else:
        exchanges = await _open_loop(target.post, talks, pace.rate, settings.load.seed)
    cpu = time.process_time() - cpu
    return summarize(exchanges, cpu, settings.max_tokens if settings.ignore_eos else None)


async def _build(target: Target, settings: ServeSettings, part: int, count: int) -> list[Conversation]:
    fields: dict[str, Any] = {
        "model": target.model, "max_tokens": settings.max_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if settings.ignore_eos:
        fields |= {"ignore_eos": True, "min_tokens": settings.max_tokens}
    if settings.schema is not None:
        described = {"name": "answer", "strict": True, "schema": settings.schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": described}
    return await asyncio.to_thread(conversations, fields, settings.load, part, count=count, turns=settings.turns)


async def _closed_loop(post: Post, talks: list[Conversation], concurrency: int, name: str) -> list[Exchange]:
    """Keep so many conversations going until all have ended."""
    waiting = iter(talks)
    found: list[Exchange] = []
    with _progress(talks, name) as progress:

        async def work() -> None:
            for talk in waiting:
                found.extend(await _converse(post, talk, progress))

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return found


async def _open_loop(post: Post, talks: list[Conversation], rate: float, seed: int) -> list[Exchange]:
    """Begin each at its time, whatever has become of those before."""
    times = np.cumsum(np.random.default_rng((seed, 3)).exponential(1 / rate, len(talks)))
    begun = time.perf_counter()
    with _progress(talks, "Measuring") as progress:

        async def work(due: float, talk: Conversation) -> list[Exchange]:
            await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
            return await _converse(post, talk, progress)

        ended = await asyncio.gather(*(work(float(due), talk) for due, talk in zip(times, talks, strict=True)))
    return [exchange for exchanges in ended for exchange in exchanges]


async def _converse(post: Post, talk: Conversation, progress: "tqdm[Any]") -> list[Exchange]:
    """Ask all of one conversation's questions; those that an answer is missing for count as failed."""
    body, found = talk.first, list[Exchange]()
    for turn in range(talk.turns):
        exchange = await post(body)
        exchange.turn = turn
        found.append(exchange)
        progress.update()
        if turn == talk.turns - 1:
            break
        answered = outcome(exchange)
        if answered.error:
            found += [_not_asked(later) for later in range(turn + 1, talk.turns)]
            progress.update(talk.turns - 1 - turn)
            break
        body = follow_up(body, answered.text, talk.questions[turn])
    return found


def _not_asked(turn: int) -> Exchange:
    now = time.perf_counter()
    return Exchange(now, now, failure="not asked: an earlier turn failed", turn=turn)


def _progress(talks: list[Conversation], name: str) -> "tqdm[Any]":
    return tqdm(total=sum(talk.turns for talk in talks), desc=name, unit="request", disable=None)
