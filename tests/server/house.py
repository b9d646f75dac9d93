"""A server in this process, with an engine process of its own, so that tests see what it holds."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import uvicorn

from engine.client import AsyncEngine
from engine.config import create_config
from server.app import create_app
from server.args import parse_args
from server.run import _Server, _state
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
            "fetches": 64 - state.media._slots._value,
            "threads": max(0, psutil.Process().num_threads() - self.most_threads),
            **{key: (now, at) for key, now, at in zip(Held._fields, held, self.at_first, strict=True) if now > at},
        }
        return {name: value for name, value in found.items() if value}


@asynccontextmanager
async def open_house(model: Path, *flags: str) -> AsyncIterator[House]:
    """Start a server of a checkpoint; it must end well."""
    engine_args, args = parse_args(["--model", str(model), "--dtype", "float32", "--device", "cpu", *flags])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the engine's process: others run tests beside it
        engine = await AsyncEngine.start(create_config(engine_args))
    state = _state(engine, args)
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Server(uvicorn.Config(create_app(state), log_config=None, lifespan="off", timeout_graceful_shutdown=2))
    serving = asyncio.create_task(server.serve([listener]))
    port = listener.getsockname()[1]
    limits = httpx.Limits(max_keepalive_connections=0)  # what is kept open would look like a leak
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False, limits=limits
    ) as client:
        pid = engine._process.pid
        assert pid is not None
        house = House(state, port, psutil.Process(pid), client)
        house.most_threads += psutil.Process().num_threads()
        while not server.started:
            await asyncio.sleep(0.01)
        house.answer = (await house.ask()).json()["choices"][0]["message"]["content"]
        await asyncio.sleep(0.2)
        house.at_first = house.held()
        yield house
    server.should_exit = True
    await serving
    await engine.stop()
    await state.media.aclose()
    state.text_pool.shutdown()
    state.image_pool.shutdown()
    listener.close()
