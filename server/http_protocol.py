"""HTTP/1.1 connections with the limits that uvicorn leaves to a proxy: bytes of a head, and time for a request."""

import asyncio
import json
import logging
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import ApiError

logger = logging.getLogger(__name__)

HEAD_BYTES = 64 << 10
"""Of the request line and all headers, or of what comes behind a body."""
_GRACE_SECONDS = 20.0
_LEAST_BYTES_PER_SECOND = 4096
"""A request has so long to come in, and longer by its size at this speed. Slower clients hold connections, no more. Nor
may one stand still for longer than the former.
"""
_MOST_PIPELINED = 16
"""Requests of a connection that wait for the one before them. Each read may bring thousands."""
_UNREAD_SECONDS = 60.0
"""After which a client that takes nothing of its answer is given up."""


class LimitedProtocol(HttpToolsProtocol):
    """Refuses heads that are too large and requests that take too long to come, and answers malformed ones in JSON."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._since_body = 0
        """Bytes that came since the last one of a body: the parser keeps a header that does not end, and joins its
        pieces in quadratic time.
        """
        self._request_bytes = 0
        self._began = 0.0
        self._last_came = 0.0
        self._unread_timer: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._cycles: list[Any] = []
        """Requests that are answered or wait for it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Give the client its time to ask for something."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client."""
        self._stop_timer()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
        # uvicorn tells the newest request only, which may wait for its turn behind the one that is answered.
        self.pipeline.clear()
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client has not taken what it was sent."""
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        """It has taken most of it."""
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
            self._watch_unread()

    def on_response_complete(self) -> None:
        """An answer has been written, or waits to be taken: what is closed meanwhile stays open for that long."""
        super().on_response_complete()
        self._watch_unread()

    def data_received(self, data: bytes) -> None:
        """Count, and parse."""
        if self._timer is None and not self._is_answering:
            self._begin()
        self._last_came = self.loop.time()
        self._request_bytes += len(data)
        self._since_body += len(data)
        super().data_received(data)
        self._check_head(self._since_body)

    def on_message_begin(self) -> None:
        """A request's first byte, which may come while the one before it is answered."""
        if self.transport.is_closing():
            raise ConnectionAbortedError  # whatever came with it is not read
        if self._timer is None:
            self._begin()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is complete; it starts the application unless it is too large."""
        if not self._check_head(len(self.url) + sum(len(name) + len(value) for name, value in self.headers)):
            return
        if len(self.pipeline) == _MOST_PIPELINED:
            self._refuse(429, "too many requests wait for the answer to the first")
            return
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        if self.cycle is not None:
            self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._since_body = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._since_body = 0
        self._stop_timer()
        if not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(400, msg)

    @property
    def _is_answering(self) -> bool:
        """Whether a request that has come whole is being answered."""
        newest = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        return newest or bool(self.pipeline)

    def _begin(self) -> None:
        """A request is waited for from now on."""
        self._stop_timer()
        self._request_bytes = 0
        self._began = self._last_came = self.loop.time()
        self._timer = self.loop.call_later(_GRACE_SECONDS, self._check_time)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_time(self) -> None:
        deadline = self._began + _GRACE_SECONDS + self._request_bytes / _LEAST_BYTES_PER_SECOND
        deadline = min(deadline, self._last_came + _GRACE_SECONDS)
        # While we do not read, or an earlier request is answered, the client's time does not end.
        if self.flow.read_paused or self._is_answering or self.loop.time() < deadline:
            self._timer = self.loop.call_at(max(deadline, self.loop.time() + 1), self._check_time)
            return
        self._timer = None
        if self._request_bytes:
            self._refuse(408, "the request took too long to come in")
        else:
            self.transport.close()

    def _watch_unread(self) -> None:
        """Look again later, if anything is buffered; it must have become less by then."""
        left = self.transport.get_write_buffer_size()
        if self._unread_timer is not None or not left:
            return

        def check() -> None:
            self._unread_timer = None
            if self.transport.get_write_buffer_size() >= left:
                logger.info("a client that did not read its answer was given up")
                self.transport.abort()
            else:
                self._watch_unread()

        self._unread_timer = self.loop.call_later(_UNREAD_SECONDS, check)

    def _check_head(self, size: int) -> bool:
        if size > HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the request's line and headers are larger than the limit of {HEAD_BYTES} bytes")
        return not self.transport.is_closing()

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        name = f"req_{uuid4().hex}"
        logger.info("a request was refused before it was read: %d, %s", status, name)
        body = json.dumps(ApiError(status, message).body()).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"x-request-id: {name}\r\nrequest-id: {name}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not (begun or self.pipeline):  # else it would be written into an answer
            self.transport.write(head.encode() + body)
        self.transport.close()
        self._watch_unread()
