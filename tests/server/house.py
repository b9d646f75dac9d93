"""A server in this process, with an engine process of its own, so that tests see what it holds."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from engine.client import AsyncEngine
from engine.config import create_config
from server.args import parse_args
from server.run import _listen, _listen_and_drain, _state
from server.state import ServerState
from tests.server.launch import user

_SETTLE_SECONDS = 20.0
_QUESTION = {"messages": [user("What is it?")], "max_tokens": 12, "temperature": 0}


class Held(NamedTuple):
    """What there is while nothing is asked."""

    tasks: int
    fds: int
    engine_fds: int
    engine_threads: int


@dataclass
class House:
    """The server, its address, and what it held at first."""

    state: ServerState
    port: int
    engine: psutil.Process
    client: httpx.AsyncClient
    at_first: Held = Held(0, 0, 0, 0)
    answer: str = ""
    most_threads: int = field(default_factory=lambda: 2 + 2 * (os.cpu_count() or 4) + 8)
    """What the pools may start in this process when they are needed."""

    async def ask(self, **fields: Any) -> httpx.Response:
        """One chat."""
        return await self.client.post("/v1/chat/completions", json=_QUESTION | fields)

    async def settle(self) -> None:
        """Wait until nothing is left of what was asked."""
        end = time.monotonic() + _SETTLE_SECONDS
        while left := self._left():
            assert time.monotonic() < end, left
            await asyncio.sleep(0.02)

    async def check(self) -> None:
        """Nothing is left, and the answers are what they were."""
        await self.settle()
        found = await self.ask()
        assert found.status_code == 200 and found.json()["choices"][0]["message"]["content"] == self.answer
        await self.settle()

    def held(self) -> Held:
        """Tasks and descriptors now."""
        return Held(
            len(asyncio.all_tasks()), psutil.Process().num_fds(), self.engine.num_fds(), self.engine.num_threads()
        )

    def _left(self) -> dict[str, Any]:
        engine, state = self.state.engine, self.state
        held = self.held()
        found = {
            "open requests": state.num_open,
            "streams": len(engine._streams),
            "answers": len(engine._outputs._answers),
            "claimed": engine._num_claimed,
            "running": engine.stats.num_running,
            "waiting": engine.stats.num_waiting,
            "cache": engine.stats.kv_cache_usage,
            "fetches": 64 - state.media._turns._free,
            "bytes of bodies": state.coming.taken + state.held.taken,
            "threads": max(0, psutil.Process().num_threads() - self.most_threads),
            **{key: (now, at) for key, now, at in zip(Held._fields, held, self.at_first, strict=True) if now > at},
        }
        return {name: value for name, value in found.items() if value}


@asynccontextmanager
async def open_house(model: Path, *flags: str) -> AsyncIterator[House]:
    """Start a server of a checkpoint; it must end well."""
    engine_args, args = parse_args(
        ["--model", str(model), "--dtype", "float32", "--device", "cpu", "--port", "0", *flags]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the engine's process: others run tests beside it
        patch.setattr("engine.client._SILENT_SECONDS", 1.0)
        engine = await AsyncEngine.start(create_config(engine_args))
        assert engine.trouble is None, "loading counts as silence"
    state, listener, stop = _state(engine, args), _listen(args), asyncio.Event()
    serving = asyncio.create_task(_listen_and_drain(state, listener, stop, asyncio.Event()))
    port = listener.getsockname()[1]
    limits = httpx.Limits(max_keepalive_connections=0)  # what is kept open would look like a leak
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False, limits=limits
    ) as client:
        pid = engine._process.pid
        assert pid is not None
        house = House(state, port, psutil.Process(pid), client)
        house.most_threads += psutil.Process().num_threads()
        await _until_it_listens(client)
        house.answer = (await house.ask()).json()["choices"][0]["message"]["content"]
        await _ask_and_leave(house)
        house.at_first = house.held()
        yield house
    stop.set()
    assert await serving == 0
    await engine.stop()
    listener.close()


async def _ask_and_leave(house: House) -> None:
    """What the engine needs to give a request up, it begins with the first."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            await house.ask(max_tokens=200, ignore_eos=True, n=8)
    while house.state.num_open or house.state.engine.stats.num_running:
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.2)


async def _until_it_listens(client: httpx.AsyncClient) -> None:
    end = time.monotonic() + _SETTLE_SECONDS
    while True:
        try:
            assert (await client.get("/health")).status_code == 200
            return
        except httpx.ConnectError:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
