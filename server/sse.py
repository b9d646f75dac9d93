"""Responses that end when their client does."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, from_exception

Result = TypeVar("Result")

_encoder = msgspec.json.Encoder()


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class EventStream(Response):
    """Server-sent events: one for each object of `events`, then `[DONE]`. An error is an event of its own.

    When the client goes away, `events` is closed at once, wherever it waits.
    """

    media_type = "text/event-stream"
    end = b"data: [DONE]\n\n"
    """What follows the last event."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], resources: AsyncExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._resources = resources
        """What the stream holds, to be let go of when it ends in any way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream (ASGI)."""
        sending = asyncio.create_task(self._send_all(send))
        watching = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            await self._resources.aclose()

    def frame(self, event: dict[str, Any]) -> bytes:
        """An event as it is sent."""
        return b"data: " + _encoder.encode(event) + b"\n\n"

    def error_event(self, error: ApiError) -> dict[str, Any]:
        """What is sent of an error."""
        return error.body()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await _send_chunk(send, self.frame(event))
        except Exception as error:
            await _send_chunk(send, self.frame(self.error_event(from_exception(error))))
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": self.end, "more_body": False})


class NamedEventStream(EventStream):
    """Server-sent events that have names: the `type` of each. The last one is known by its name."""

    end = b""

    def frame(self, event: dict[str, Any]) -> bytes:
        """An event as it is sent."""
        name: str = event.get("type", "error")  # an error object of OpenAI has no type
        return f"event: {name}\n".encode() + super().frame(event)


def json_response(answer: Any) -> Response:
    """An answer in one piece."""
    return Response(_encoder.encode(answer), media_type="application/json")


async def unless_client_goes(request: Request, work: Awaitable[Result]) -> Result:
    """Do the work of a plain request, and give it up when the client goes away.

    Raises:
        ClientGone: the client went away.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
        # An error holds this frame, which through the task would hold it, and with it what the work had in hand.
        del working, watching, task


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_chunk(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})
