"""The server that is measured, any that speaks OpenAI's chat API."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.report import Exchange

_VERSION_TIMEOUT = aiohttp.ClientTimeout(total=10)


@dataclass(frozen=True, slots=True)
class Target:
    """A server and the model that it is asked for."""

    session: aiohttp.ClientSession
    url: str
    """With /v1."""
    model: str
    version: dict[str, Any] | None
    """What its /version tells, if it has one."""

    async def post(self, body: bytes) -> Exchange:
        """Send a chat request and note when bytes arrive, nothing more; a failure is part of what is noted."""
        exchange = Exchange(started=time.perf_counter())
        try:
            async with self.session.post(f"{self.url}/chat/completions", data=body) as response:
                exchange.status = response.status
                async for data in response.content.iter_any():
                    exchange.reads.append((time.perf_counter(), data))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            exchange.failure = f"{type(error).__name__}: {error}"
        exchange.ended = time.perf_counter()
        return exchange

    def described(self) -> dict[str, Any]:
        """For the record."""
        return {"model": self.model, "version": self.version}


@asynccontextmanager
async def connect(
    base_url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0
) -> AsyncIterator[Target]:
    """Find out what is served; without `model` the server's first is measured.

    Raises:
        RuntimeError: the server names no model.
    """
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    root = base_url.rstrip("/").removesuffix("/v1")
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        read_bufsize=1 << 20,
    ) as session:
        model = model or await _first_model(session, f"{root}/v1/models")
        yield Target(session, f"{root}/v1", model, await _version(session, f"{root}/version"))


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(url) as response:
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RuntimeError(
            f"{url} does not name a model ({error}): start a server, name another with --base-url, or give --model"
        ) from error


async def _version(session: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    """None where there is none: it is not part of OpenAI's API."""
    try:
        async with session.get(url, timeout=_VERSION_TIMEOUT) as response:
            found = await response.json() if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None
    return found if isinstance(found, dict) else None
