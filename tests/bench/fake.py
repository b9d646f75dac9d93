"""A chat server of known behaviour: what it answers, when, and what it was asked."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.target import Target, connect


@dataclass
class Fake:
    """Answers in two pieces, of which the first takes `wait_s` for each of the user's messages."""

    wait_s: float = 0.0
    fail_in_turn: int | None = None
    version: Any = field(default_factory=lambda: {"version": "7"})
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    running: int = 0
    most_at_once: int = 0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Stream one answer."""
        self.keys.add(request.headers.get("Authorization"))
        body = await request.json()
        self.asked.append(body)
        number, turn = len(self.asked), len(body["messages"]) // 2
        if turn == self.fail_in_turn:
            return web.Response(status=500, text="broken")
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            return await self._stream(request, number, turn)
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, number: int, turn: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(self.wait_s * (turn + 1))
        usage = {"usage": {"prompt_tokens": 5, "completion_tokens": 2}}
        for chunk in (_delta("answer "), _delta(str(number)), {"choices": [], **usage}):
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def models(self, request: web.Request) -> web.Response:
        """One."""
        return web.json_response({"data": [{"id": "first"}]})

    async def versions(self, request: web.Request) -> web.Response:
        """As given; None: there is no such page."""
        if self.version is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        return web.json_response(self.version)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Fake"]:
        """Listen until the block ends."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/version", self.versions)
        async with TestServer(app) as server:
            self.url = str(server.make_url("/"))
            yield self

    @asynccontextmanager
    async def target(self) -> AsyncIterator[Target]:
        """The same as the benchmark sees it."""
        async with self.serve(), connect(self.url) as target:
            yield target


def _delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}
