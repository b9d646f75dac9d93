"""Connections that hold their server up, or speak no HTTP."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from server import http_protocol
from server.http_protocol import LimitedProtocol

Address = tuple[str, int]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the size of the body, once it is complete; at /slow a while later."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        more = message["more_body"]
    if scope["path"] == "/large":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % LARGE)]})
        await send({"type": "http.response.body", "body": bytes(LARGE)})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
    if scope["path"] == "/slow":
        await asyncio.sleep(1.2)
    await send({"type": "http.response.body", "body": b"%8d" % size})


@pytest.fixture
async def address(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Address]:
    monkeypatch.setattr(http_protocol, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(http_protocol, "_LEAST_BYTES_PER_SECOND", 1000)
    config = uvicorn.Config(echo, port=0, http=LimitedProtocol, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[:2]
    server.should_exit = True
    await serving


async def talk(address: Address, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Everything that is answered until the server closes the connection."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(pause)
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionResetError:
        return b"reset"
    finally:
        writer.close()


def refusal(answer: bytes) -> tuple[int, str]:
    """Status and message, the form checked."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head and b"connection: close" in head
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return int(head.split()[1]), error["message"]


LARGE = 40_000_000
POST = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


async def test_a_plain_request(address: Address) -> None:
    answer = await talk(address, POST + b"Content-Length: 5\r\n\r\nhello")
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"       5")


async def test_a_large_body_is_no_large_head(address: Address) -> None:
    body = b"x" * 1_000_000
    one = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    answer = await talk(address, one + one + POST + b"Content-Length: 2\r\n\r\nhi")
    assert answer.count(b" 1000000") == 2 and answer.endswith(b"       2")


@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\nX: " + b"a" * 70_000,
        b"POST / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"POST /" + b"a" * 70_000,
        b"POST /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + b"X: a\r\n" * 40_000,
        b"POST / HTTP/1.1\r\n" + b"".join(b"X%d: a\r\n" % i for i in range(20_000)) + b"\r\n",
    ],
    ids=["value", "whole value", "path", "whole path", "headers", "whole headers"],
)
@pytest.mark.parametrize("size", [1 << 20, 5000])
async def test_a_large_head_is_refused(address: Address, head: bytes, size: int) -> None:
    pieces = [head[start : start + size] for start in range(0, len(head), size)]
    answer = await talk(address, *pieces)
    assert answer == b"reset" or refusal(answer)[0] == 431


@pytest.mark.parametrize(
    "rubbish",
    [
        b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 3, b"POST / HTTP/9.9\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        POST + b"Content-Length: -1\r\n\r\n", POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello", b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    ],
)  # fmt: skip
async def test_what_is_no_http_is_refused_in_json(address: Address, rubbish: bytes) -> None:
    assert refusal(await talk(address, rubbish)) == (400, "Invalid HTTP request received.")


@pytest.mark.parametrize(
    "begun", [b"P", POST, POST + b"Content-Length: 5\r\n\r\nhe", POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhe"]
)
async def test_a_request_that_does_not_come_is_given_up(address: Address, begun: bytes) -> None:
    assert refusal(await talk(address, begun)) == (408, "the request took too long to come in")


async def test_a_slow_trickle_is_given_up(address: Address) -> None:
    pieces = [POST + b"Content-Length: 500\r\n\r\n", *[b"x"] * 30]
    assert refusal(await talk(address, *pieces, pause=0.05))[0] == 408


async def test_a_body_that_stands_still_is_given_up(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much of it has come."""
    started = asyncio.get_running_loop().time()
    answer = await talk(address, POST + b"Content-Length: 2000000\r\n\r\n" + b"x" * 1_000_000)
    assert refusal(answer)[0] == 408
    assert asyncio.get_running_loop().time() - started < 3


@pytest.mark.parametrize("reads", [True, False])
async def test_an_answer_that_is_not_read_is_given_up(
    address: Address, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    monkeypatch.setattr(http_protocol, "_UNREAD_SECONDS", 1.0)
    reader, writer = await asyncio.open_connection(*address, limit=1 << 10)
    writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    received = 0
    try:
        for _ in range(40):  # a slow reader is no reader that does not read
            await asyncio.sleep(0.1)
            received += len(await reader.read(1 << 20)) if reads else 0
        while chunk := await reader.read(1 << 20):
            received += len(chunk)
    except ConnectionResetError:
        assert not reads
    finally:
        writer.close()
    assert (received > LARGE) == reads


async def test_what_is_left_of_an_answer_is_given_up_too(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little of it waits for the application to be told, and the connection is being closed."""
    monkeypatch.setattr(http_protocol, "_UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(LimitedProtocol, "pause_writing", lambda self: None)
    reader, writer = await asyncio.open_connection(*address, limit=1 << 10)
    writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    await asyncio.sleep(1)
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while chunk := await asyncio.wait_for(reader.read(1 << 20), 5):
            received += len(chunk)
    writer.close()
    assert 0 < received < LARGE


async def test_a_slow_upload_goes_on(address: Address) -> None:
    """At some 4,000 bytes a second, for longer than the time that is given to every request."""
    pieces = [POST + b"Content-Length: 4000\r\n\r\n", *[b"x" * 200] * 20]
    assert (await talk(address, *pieces, pause=0.05)).endswith(b"    4000")


@pytest.mark.parametrize("noise", [b"", b"\r\n" * 5])
async def test_a_client_that_asks_for_nothing_is_let_go(address: Address, noise: bytes) -> None:
    answer = await talk(address, *[noise] * 2, pause=0.1)
    assert answer == b"" or refusal(answer)[0] == 408


async def test_a_connection_that_is_kept_may_be_used_again_and_not_held(address: Address) -> None:
    one = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
    answer = await talk(address, one, one, b"POST / HT", pause=0.7)
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert b"HTTP/1.1 408 " in answer


@pytest.mark.parametrize("begun", [b"POST / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"])
@pytest.mark.parametrize("path", [b"/", b"/slow"])
async def test_a_request_behind_another_may_not_hold_the_connection(
    address: Address, path: bytes, begun: bytes
) -> None:
    """It is given up once the one before it is answered, and not sooner."""
    first = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
    answer = await talk(address, first + begun)
    assert answer.count(b"HTTP/1.1 200 ") == 1 and b"       2" in answer
    rest = answer.partition(b"       2")[2]
    assert rest == b"" or refusal(rest)[0] == 408


async def test_a_refusal_is_not_written_into_an_answer(address: Address) -> None:
    first = b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
    assert b" 400 " not in await talk(address, first, b"rubbish\r\n\r\n", pause=0.1)
