"""Requests byte by byte, since a client's library would put them right."""

import json
import socket
from dataclasses import dataclass
from typing import Any

from tests.server.launch import Server

_SECONDS = 20.0


@dataclass(frozen=True)
class Answer:
    """The first answer that came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, Any]:
        """The error of an answer in OpenAI's form, checked as far as any path has it."""
        assert self.headers["content-type"] == "application/json", self
        assert not any(leak in self.body for leak in (b"Traceback", b"object at 0x", b".py", b"/tmp/"))
        found = json.loads(self.body)
        assert found.keys() == {"error"}
        error: dict[str, Any] = found["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        return error


def exchange(server: Server, data: bytes) -> Answer:
    """Send bytes on a connection of their own and read one answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=_SECONDS) as connection:
        connection.sendall(data)
        received = b""
        while b"\r\n\r\n" not in received:
            received += _more(connection)
        head, _, body = received.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
        while len(body) < int(headers.get("content-length", "0")):
            body += _more(connection)
    return Answer(int(line.split()[1]), headers, body)


def _more(connection: socket.socket) -> bytes:
    received = connection.recv(1 << 16)
    assert received, "the connection ended"
    return received


def get(server: Server, target: str, *headers: str, method: str = "GET") -> Answer:
    """Ask for a request target as it stands."""
    lines = [f"{method} {target} HTTP/1.1", "Host: here", "Connection: close", *headers]
    return exchange(server, "\r\n".join([*lines, "", ""]).encode("latin-1"))


def post(server: Server, body: bytes, *headers: str, path: str = "/v1/completions") -> Answer:
    """Post a body under headers that may say anything about it."""
    kind = (
        []
        if any(header.lower().startswith("content-type") for header in headers)
        else ["Content-Type: application/json"]
    )
    lines = [f"POST {path} HTTP/1.1", "Host: here", *kind, *headers]
    return exchange(server, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)
