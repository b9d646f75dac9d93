"""Clients that leave at every moment, by a closed connection or a broken one: nothing is left of them."""

import asyncio
import json
import random
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec
from tests.server.house import House, open_house
from tests.server.launch import image_part, text_part, user
from tests.soak.pictures import data_url, noise

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
PATHS = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"]
LONG: dict[str, Any] = {"max_tokens": 16000, "ignore_eos": True, "temperature": 0}
VARIANTS = [(stream, reset) for stream in (False, True) for reset in (False, True)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(checkpoint: MakeCheckpoint) -> AsyncIterator[House]:
    model = checkpoint(CheckpointSpec(max_position_embeddings=16384))
    flags = ("--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--allow-private-media-hosts")
    async with open_house(model, "--served-model-name", "vlm", *flags) as house:
        yield house


@dataclass
class Visitor:
    """A client that speaks over a bare socket."""

    house: House
    path: str
    stream: bool
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def come(cls, house: House, *, stream: bool, path: str = CHAT) -> "Visitor":
        return cls(house, path, stream, *await asyncio.open_connection("127.0.0.1", house.port))

    async def send(self, share: float = 1.0, *, content: Any = "Hi", **fields: Any) -> None:
        """Send the first part of a request, or all of it."""
        messages = [user(content) if isinstance(content, str) else user(*content)]
        body: dict[str, Any] = LONG | {"model": "vlm", "stream": self.stream} | fields
        body |= {"/v1/completions": {"prompt": content}, "/v1/responses": {"input": content}}.get(
            self.path, {"messages": messages}
        )
        if self.path == "/v1/responses":
            body["max_output_tokens"] = body.pop("max_tokens")
        data = json.dumps(body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        message = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        self.writer.write(message[: int(len(message) * share)])
        await self.writer.drain()

    async def read_until(self, text: bytes, count: int = 1) -> None:
        """Read until some text came so many times."""
        for _ in range(count):
            await asyncio.wait_for(self.reader.readuntil(text), 30)

    async def read_tokens(self, count: int) -> None:
        """Read until so many tokens came; several may come at once."""
        while count > 0:
            line = await asyncio.wait_for(self.reader.readuntil(b"\n"), 30)
            if line.startswith(b"data: {"):
                count -= len(json.loads(line[6:])["choices"][0].get("token_ids", []))

    async def leave(self, *, reset: bool) -> None:
        if reset:
            found: socket.socket = self.writer.get_extra_info("socket")
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            assert reset


async def until(ready: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


async def each(house: House, act: Callable[[Visitor, bool], Awaitable[None]], path: str = CHAT) -> None:
    """Plain and streaming, both ways to leave; and again, so that what is left of each would add up."""
    for stream, reset in VARIANTS * 2:
        await act(await Visitor.come(house, stream=stream, path=path), reset)
    await house.check()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.99])
async def test_before_the_request_is_complete(house: House, share: float) -> None:
    async def act(visitor: Visitor, reset: bool) -> None:
        await visitor.send(share, content="x" * 300)
        await asyncio.sleep(0.01)
        await visitor.leave(reset=reset)

    await each(house, act)


async def test_at_once(house: House) -> None:
    async def act(visitor: Visitor, reset: bool) -> None:
        await visitor.send()
        await visitor.leave(reset=reset)

    await each(house, act)


async def test_while_images_are_fetched(house: House) -> None:
    seen: list[web.Request] = []

    async def slow(request: web.Request) -> web.StreamResponse:
        seen.append(request)
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.02)

    app = web.Application()
    app.add_routes([web.get("/image", slow)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/image"

    async def act(visitor: Visitor, reset: bool) -> None:
        before = len(seen)
        await visitor.send(content=[image_part(url), image_part(url), text_part("What?")])
        await until(lambda: len(seen) == before + 2)
        await visitor.leave(reset=reset)
        await until(lambda: all(request.transport is None or request.transport.is_closing() for request in seen))

    try:
        for stream, reset in VARIANTS:
            await act(await Visitor.come(house, stream=stream), reset)
    finally:
        await runner.cleanup()
    await house.check()


@pytest.mark.parametrize("place", ["template", "image"])
async def test_while_a_thread_works_for_it(house: House, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = {"template": (house.state.template, "render"), "image": (house.state.images, "_prepare")}[place]
    entered, gate, work = threading.Semaphore(0), threading.Semaphore(0), getattr(owner, name)

    def wait(*args: Any, **kwargs: Any) -> Any:
        entered.release()
        assert gate.acquire(timeout=30)
        return work(*args, **kwargs)

    async def act(visitor: Visitor, reset: bool) -> None:
        await visitor.send(content=[image_part(data_url(noise(random.Random(number.pop())))), text_part("What?")])
        await until(lambda: entered.acquire(blocking=False))
        await visitor.leave(reset=reset)
        await until(lambda: house.state.num_open == 0)
        gate.release()

    number = list(range(8))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wait)
        for stream, reset in VARIANTS * 2:
            await act(await Visitor.come(house, stream=stream), reset)
        await house.settle()
    await house.check()


async def test_while_it_waits_for_its_turn(house: House) -> None:
    running = [await Visitor.come(house, stream=True) for _ in range(2)]
    for visitor in running:
        await visitor.send()
        await visitor.read_until(b"data: ", 3)
    waiting = [(await Visitor.come(house, stream=stream), reset) for stream, reset in VARIANTS * 2]
    for visitor, _ in waiting:
        await visitor.send()
    await until(lambda: house.state.engine.stats.num_waiting == len(waiting))
    for visitor, reset in waiting:
        await visitor.leave(reset=reset)
    await until(lambda: house.state.engine.stats.num_waiting == 0)
    assert house.state.engine.stats.num_running == 2
    for visitor in running:
        await visitor.read_until(b"data: ", 3)
        await visitor.leave(reset=False)
    await house.check()


async def test_while_its_prompt_is_computed(house: House) -> None:
    async def act(visitor: Visitor, reset: bool) -> None:
        await visitor.send(content="x y " * 1000, cache_salt=str(time.monotonic()), max_tokens=10)
        await until(lambda: house.state.engine.stats.num_running == 1)
        assert not house.state.metrics._generation_tokens._value.get() - tokens
        await visitor.leave(reset=reset)
        await until(lambda: house.state.engine.stats.num_running == 0)

    tokens = house.state.metrics._generation_tokens._value.get()
    for stream, reset in VARIANTS:
        await act(await Visitor.come(house, stream=stream), reset)
    await house.check()


@pytest.mark.parametrize("path", PATHS)
async def test_while_its_answer_is_made(house: House, path: str) -> None:
    async def act(visitor: Visitor, reset: bool) -> None:
        await visitor.send()
        if visitor.stream:
            await visitor.read_until(b"\r\n\r\n")
            await visitor.read_until(b"data: ", 5)
        else:
            await until(lambda: house.state.engine.stats.num_running == 1)
        await visitor.leave(reset=reset)
        await until(lambda: house.state.engine.stats.num_running == 0)

    await each(house, act, path)


@pytest.mark.parametrize("left", [2, 1, 0])
async def test_just_before_the_end(house: House, left: int) -> None:
    """So many tokens before it, as far as a client can tell."""

    async def act(visitor: Visitor, reset: bool) -> None:
        await visitor.send(max_tokens=12, return_token_ids=True)
        if visitor.stream:
            await visitor.read_tokens(12 - left)
        else:
            await visitor.read_until(b"HTTP/1.1 200 OK\r\n")
        await visitor.leave(reset=reset)

    await each(house, act)


async def test_a_reader_that_stops_reading(house: House) -> None:
    """The answer is made all the same, and let go of when the connection is."""

    async def act(visitor: Visitor, reset: bool) -> None:
        await visitor.send(max_tokens=400, logprobs=True, top_logprobs=20)
        await until(lambda: house.state.engine.stats.num_running == 1)
        visitor.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: house.state.engine.stats.num_running == 0)
        await visitor.leave(reset=reset)

    for reset in (False, True):
        await act(await Visitor.come(house, stream=True), reset)
    await house.check()
