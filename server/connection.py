"""What uvicorn leaves open about connections: how much may come that is no body, and the form of its own errors."""

import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import bad_request

MOST_HEAD_BYTES = 64 << 10
"""Of a request's line and headers, or of what comes behind its body."""


class Connection(HttpToolsProtocol):
    """Refuses heads without end: their pieces would be put together in quadratic time, while nobody else is served."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._since_body = 0

    def data_received(self, data: bytes) -> None:
        """Take bytes from the client (asyncio)."""
        self._since_body += len(data)
        super().data_received(data)
        if self._since_body > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the request's head is larger than the limit of {MOST_HEAD_BYTES} bytes")

    def on_body(self, body: bytes) -> None:
        """A piece of a body came (httptools)."""
        self._since_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has come whole (httptools)."""
        self._since_body = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and hang up; there may be no path that asks for another form."""
        body = json.dumps(bad_request(msg).body()).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
