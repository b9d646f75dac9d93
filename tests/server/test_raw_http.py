"""Ways around the API key, bodies that are not what their headers say, and what is no HTTP at all."""

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.conftest import MakeCheckpoint
from tests.server import raw
from tests.server.launch import Launch, Server

KEY = "s3cret-key"
SIGNED = f"Authorization: Bearer {KEY}"
LIMIT = 200_000
HEAD_LIMIT = 64 << 10
BODY = b'{"prompt": "Hi", "max_tokens": 2, "temperature": 0, "return_token_ids": true}'


@pytest.fixture(scope="module")
def server(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    """Asks for a key and believes to be below a path."""
    flags = ("--api-key", KEY, "--root-path", "/proxy", "--max-request-bytes", str(LIMIT))
    return launch(checkpoint(), "--served-model-name", "vlm", *flags)


def answer_of(server: Server) -> list[int]:
    answer = raw.post(server, BODY, SIGNED, f"Content-Length: {len(BODY)}")
    assert answer.status == 200, answer
    ids: list[int] = json.loads(answer.body)["choices"][0]["token_ids"]
    return ids


@pytest.fixture(autouse=True)
def _still_answers(server: Server) -> Iterator[None]:
    """After each test as before it, and with the key in no log."""
    expected = answer_of(server)
    yield
    assert answer_of(server) == expected
    assert KEY not in server.stdout + server.stderr
    assert "Traceback" not in server.stderr


# Where the models would be told, were it not for the key: each is there for one who has it, or is nothing.
TARGETS = [
    "/v1/models", "//v1/models", "/v1//models", "/v1/../v1/models", "/x/../v1/models", "/./v1/models",
    "/health/../v1/models", "/%76%31/models", "/%76%31%2fmodels", "/%2576%2531/models", "/v1/models/", "/V1/models",
    "/v1;x/models", "/v1/models;x", "/v1/models?x", "/v1/models%3f", "/v1/models#x", "/v1/models%20", "/v1/models%0a",
    "/v1%00/models", "/\\v1/models", "http://127.0.0.1/v1/models", "http://here//v1/models", "HTTP://a@b:1/v1/models",
    "/proxy/v1/models", "/proxy//v1/models", "/proxy/proxy/v1/models", "/proxyv1/models", "/proxy/../v1/models",
    "/proxy%2fv1/models", "/%70roxy/v1/models", "//proxy/v1/models", "/%ff%fe/models", "/v1/responses/%2e%2e/models",
    "*", "/proxy", "/v1",
]  # fmt: skip
NO_TARGETS = ["\\v1\\models", "v1/models", "http:///v1/models", "http://here", "http://here:99999/v1/models",
              "http://[::1/v1/models", "/v1\t/models", "/\xff/v1/models", ""]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_no_target_leads_past_the_key(server: Server, target: str) -> None:
    answer = raw.get(server, target)
    assert answer.status in (401, 404)
    assert answer.error()["type"] == {401: "authentication_error", 404: "not_found_error"}[answer.status]
    assert raw.get(server, target, "x-api-key: wrong").status == answer.status
    with_key = raw.get(server, target, SIGNED)
    # What is there is guarded; what is not guarded is nothing.
    assert with_key.status in ((200, 404) if answer.status == 401 else (404,))


def test_some_targets_are_there(server: Server) -> None:
    """Else the test above would show nothing."""
    for target in ("/v1/models", "/proxy/v1/models", "/%76%31/models", "/v1/models?x", "http://here/v1/models"):
        assert raw.get(server, target, SIGNED).status == 200


@pytest.mark.parametrize("target", NO_TARGETS)
def test_what_is_no_target(server: Server, target: str) -> None:
    answer = raw.get(server, target)
    assert answer.status == 400
    assert answer.error()["message"]


HEADERS = [
    "Host: 127.0.0.1", "Host: ", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https", "X-Forwarded-Host: x",
    "X-Forwarded-Prefix: /v1", "X-Original-URL: /health", "X-Rewrite-URL: /health", "Forwarded: for=127.0.0.1",
    "X-HTTP-Method-Override: OPTIONS", "Authorization: Bearer ", "Authorization: Bearer \xff\xfe", "Authorization:",
    "Authorization: Bearer s3cret-ke", "Authorization: Bearer s3cret-keyy", "Authorization: Basic czNjcmV0LWtleQ==",
    "x-api-key: ", "x-api-key: S3CRET-KEY", "Cookie: api_key=s3cret", "Origin: http://elsewhere",
    "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    "Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_no_header_stands_for_the_key(server: Server, header: str) -> None:
    connection = "Connection: Upgrade" if header.startswith("Upgrade") else "Accept: */*"
    answer = raw.exchange(server, f"GET /v1/models HTTP/1.1\r\n{connection}\r\n{header}\r\n\r\n".encode("latin-1"))
    assert answer.status == 401
    assert answer.error()["code"] == "invalid_api_key"


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PROPFIND"])
def test_no_method_is_free(server: Server, method: str) -> None:
    assert raw.get(server, "/v1/models", method=method).status == 401


LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
FRAMES: list[tuple[list[str], bytes, int]] = [
    (["Content-Length: 5"], BODY, 400),
    (["Content-Length: -1"], BODY, 400),
    (["Content-Length: +77"], BODY, 400),
    (["Content-Length: 0x10"], BODY, 400),
    (["Content-Length: " + "9" * 5000], BODY, 400),
    ([f"Content-Length: {10**15}"], BODY, 413),
    ([f"Content-Length: {LIMIT + 1}"], b"", 413),
    ([LENGTH, "Content-Length: 5"], BODY, 400),
    ([LENGTH, "Transfer-Encoding: chunked"], CHUNKED, 400),
    (["Transfer-Encoding: xchunked", LENGTH], BODY, 400),
    (["Transfer-Encoding : chunked"], CHUNKED, 400),
    (["Transfer-Encoding: chunked"], b"zz\r\n" + BODY, 400),
    (["Transfer-Encoding: chunked"], CHUNKED, 200),
    (["Transfer-Encoding: chunked"], b"%x\r\n%s\r\n" % (LIMIT + 1, b" " * (LIMIT + 1)), 413),
    (["Transfer-Encoding: chunked"], b"1\r\n \r\n" * 100 + CHUNKED, 200),
    (["Transfer-Encoding: chunked"], CHUNKED[:-2] + b"X: " + b"y" * (3 * HEAD_LIMIT), 431),
    (["Transfer-Encoding: chunked"], b"%x;" % len(BODY) + b"y" * (3 * HEAD_LIMIT), 431),
    ([], BODY, 400),
    (["Content-Length: 0"], b"", 400),
]


@pytest.mark.parametrize(("headers", "body", "status"), FRAMES, ids=lambda value: str(value)[:50])
def test_frames_that_lie(server: Server, headers: list[str], body: bytes, status: int) -> None:
    answer = raw.post(server, body, SIGNED, *headers)
    assert answer.status == status
    if status != 200:
        assert answer.error()["message"]


CODED: list[tuple[bytes, str]] = [
    (b"\xef\xbb\xbf" + BODY, "X-Nothing: x"),
    (BODY.decode().encode("utf-16"), "X-Nothing: x"),
    (BODY.decode().encode("utf-16-le"), "Content-Type: application/json; charset=utf-16"),
    (BODY.decode().encode("utf-32"), "X-Nothing: x"),
    (gzip.compress(BODY, mtime=0), "Content-Encoding: gzip"),
    (b"\x1f\x8b" + BODY, "Content-Encoding: deflate"),
    (BODY.replace(b"Hi", b"\xff"), "X-Nothing: x"),
    (BODY.replace(b"Hi", b"\xed\xa0\x80"), "X-Nothing: x"),
    (BODY.replace(b"Hi", b"\xc0\x80"), "X-Nothing: x"),
    (BODY + BODY, "X-Nothing: x"),
    (BODY + b"\0", "X-Nothing: x"),
]


@pytest.mark.parametrize(("body", "header"), CODED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]
)
def test_bodies_in_other_codings(server: Server, body: bytes, header: str, path: str) -> None:
    answer = raw.post(server, body, SIGNED, header, f"Content-Length: {len(body)}", path=path)
    assert answer.status == 400
    assert "JSON" in answer.error()["message"]


NO_HTTP = [
    b"\x16\x03\x01\x02\0\x01\0", bytes(100), b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\xff" * 50,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\nX: a\0b\r\n\r\n", b"GET / HTTP/1.1\r\nX\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("data", NO_HTTP)
def test_what_is_no_http(server: Server, data: bytes) -> None:
    assert raw.exchange(server, data).status == 400


HEADS = [
    b"GET /" + b"a" * (2 * HEAD_LIMIT),
    b"GET / HTTP/1.1\r\nX: " + b"y" * (2 * HEAD_LIMIT),
    b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(HEAD_LIMIT // 4)),
    b"GET / HTTP/1.1\r\n" + b"y" * (2 * HEAD_LIMIT),
]


@pytest.mark.parametrize("data", HEADS, ids=range(len(HEADS)))
def test_heads_without_end(server: Server, data: bytes) -> None:
    answer = raw.exchange(server, data)
    assert answer.status == 431
    assert str(HEAD_LIMIT) in answer.error()["message"]


def test_long_heads_that_end(server: Server) -> None:
    answer = raw.post(server, BODY, SIGNED, LENGTH, "X-Long: " + "y" * (HEAD_LIMIT - 1000))
    assert answer.status == 200


def test_a_head_without_end_holds_nobody_up(server: Server) -> None:
    """Sent as fast as it goes, while others ask."""

    def flood() -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            try:
                connection.sendall(b"GET / HTTP/1.1\r\nX: ")
                for _ in range(30):
                    connection.sendall(b"y" * (1 << 20))
            except OSError:
                return

    flooding = threading.Thread(target=flood)
    flooding.start()
    started = time.monotonic()
    while flooding.is_alive():
        assert server.get("/health").status_code == 200
    flooding.join()
    assert time.monotonic() - started < 5


def test_requests_in_a_row_are_answered_a_few_at_a_time(server: Server) -> None:
    """Each read may bring thousands, and an answer to each that nobody reads."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n" * 10)
        received = b""
        while received.count(b"HTTP/1.1 200") < 10:
            received += connection.recv(1 << 16)
    many = b"GET /health HTTP/1.1\r\n\r\n" * 5000
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        received = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(many)
            while more := connection.recv(1 << 16):  # it ends
                received += more
    assert received.count(b"HTTP/1.1 200") < 100


def test_a_client_that_goes_while_its_next_request_waits(server: Server) -> None:
    body = json.dumps({"prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "n": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\n{SIGNED}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    ended = server.metric("vllm:request_success_total", finished_reason="length")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + body + b"GET /health HTTP/1.1\r\n\r\n")
        server.wait_for_metric("vllm:num_requests_running", lambda value: value > 0)
    server.wait_for_metric("vllm:num_requests_running", lambda value: value == 0)
    assert server.metric("vllm:request_success_total", finished_reason="length") == ended


def test_clients_that_hang_up_in_the_middle(server: Server) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{SIGNED}\r\nContent-Type: application/json\r\n".encode()
    for rest in (
        b"",
        b"Content-Le",
        b"Content-Length: 900\r\n\r\n" + BODY,
        b"Transfer-Encoding: chunked\r\n\r\nff\r\n{",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + rest)
    server.wait_for_metric("vllm:num_requests_running", lambda value: value == 0)
