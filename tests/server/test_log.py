"""Lines of the log."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from engine.log import JsonFormatter
from tests.conftest import MakeCheckpoint
from tests.server import raw
from tests.server.launch import Launch, Server, data_url, image_part, text_part, user

KEY = "key-of-the-server"
SECRET = "Melanocetus"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def json_server(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    return launch(checkpoint(), "--log-format", "json", "--api-key", KEY, "--log-level", "debug")


@pytest.fixture(scope="module")
def text_server(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    return launch(checkpoint(), "--api-key", KEY)


def parsed(text: str) -> list[dict[str, Any]]:
    """Each line, which must be an object of the four keys and perhaps more."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "message"}
        assert datetime.fromisoformat(line["time"]).utcoffset() == UTC.utcoffset(None)
        assert line["level"] in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    return lines


def wait_for(server: Server, pattern: str) -> re.Match[str]:
    """The one line that holds a pattern; it comes when an answer has ended, which its client may know before."""
    end = time.monotonic() + 10
    while not (found := list(re.finditer(rf"^.*{pattern}.*\n", server.stderr, re.MULTILINE))):
        assert time.monotonic() < end, server.stderr
        time.sleep(0.02)
    assert len(found) == 1
    return found[0]


def of_request(server: Server, name: str) -> dict[str, Any]:
    """The line of a request, by the name that it was given."""
    (line,) = parsed(wait_for(server, rf'"request_id": "{name}"')[0])
    return line


def traffic(server: Server, picture: str) -> Iterator[tuple[str, str, str, int]]:
    """Requests that hold what nobody else should know: name, method, path and status of each."""
    key = {"Authorization": f"Bearer {KEY}"}
    body = {"messages": [user(image_part(picture), text_part(SECRET))], "max_tokens": 2}
    with server.client() as client:
        cases: list[tuple[str, str, str, dict[str, Any], int]] = [
            ("chat", "POST", CHAT, {"json": body, "headers": key}, 200),
            ("stream", "POST", CHAT, {"json": {**body, "stream": True}, "headers": key}, 200),
            ("no-key", "POST", CHAT, {"json": body, "headers": {"Authorization": f"Bearer {SECRET}"}}, 401),
            ("bad", "POST", CHAT, {"json": {**body, "temperature": -1}, "headers": key}, 400),
            ("query", "GET", "/v1/models", {"params": {"api_key": SECRET}, "headers": key}, 200),
            ("lines", "GET", '/a%0A{"level": "x"}%1B[0m', {}, 404),
        ]
        for name, method, path, options, status in cases:
            headers = {**options.pop("headers", {}), "X-Request-Id": name}
            assert client.request(method, path, headers=headers, **options).status_code == status
            yield name, method, path, status


def test_json_lines(json_server: Server, photo_files: list[Any]) -> None:
    picture = data_url(photo_files[1])
    for name, method, path, status in traffic(json_server, picture):
        line = of_request(json_server, name)
        assert (line["method"], line["status"], line["logger"]) == (method, status, "server.access")
        assert line["path"] == path if "%" not in path else line["path"].startswith("/a%0A")
        assert re.fullmatch(r"127\.0\.0\.1:\d+", line["client"])
        assert 0 < line["duration_ms"] < 60_000
    said = json_server.stderr
    assert SECRET not in said and KEY not in said and picture[100:140] not in said
    loggers = {line["logger"] for line in parsed(said)}
    assert loggers >= {"server", "server.access", "engine.worker.model_runner"}, "both processes write"


def test_text_lines(text_server: Server, photo_files: list[Any]) -> None:
    for name, method, path, status in traffic(text_server, data_url(photo_files[1])):
        shown = re.escape(path) if "%" not in path else r"/a%0A\S*"
        wait_for(
            text_server, rf'INFO server\.access: 127\.0\.0\.1:\d+ - "{method} {shown}" {status} in [\d.]+ ms, {name}$'
        )
    assert SECRET not in text_server.stderr and KEY not in text_server.stderr
    assert not any(line.startswith("{") for line in text_server.stderr.splitlines())


@pytest.mark.parametrize("key", ["x\n12:00:00 INFO server.access: forged\x1b]0;own\x07", SECRET * 10_000])
def test_keys_of_a_client_s_own_are_not_written(text_server: Server, key: str) -> None:
    """They are part of where an error is; the client is told of them, as plain characters and cut."""
    before = text_server.stderr
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "x", "logit_bias": {key: "y"}}
    with text_server.client() as client:
        refused = client.post("/v1/completions", json=body, headers=headers)
        assert client.post(f"/{'A' * 50_000}", json={}, headers=headers).status_code == 404
    param = refused.json()["error"]["param"]
    assert refused.status_code == 400 and param.startswith("logit_bias.") and len(param) < 100 and param.isprintable()
    end = time.monotonic() + 10
    while not re.search("POST /AAA.* refused: 404", lines := text_server.stderr[len(before) :]):
        assert time.monotonic() < end, lines
        time.sleep(0.02)
    assert re.search(r"POST /v1/completions refused: 400, logit_bias, req_[0-9a-f]{32}\n", lines)
    assert SECRET not in lines and "\x1b" not in lines and "\n12:00:00 INFO server.access: forged" not in lines
    assert max(map(len, lines.splitlines())) < 500


def test_what_is_no_http_has_a_name_too(text_server: Server) -> None:
    name = raw.exchange(text_server, b"GARBAGE\r\n\r\n").headers["x-request-id"]
    assert re.fullmatch("req_[0-9a-f]{32}", name)
    wait_for(text_server, f"refused before it was read: 400, {name}")


def test_a_client_that_a_proxy_tells_of(json_server: Server) -> None:
    with json_server.client() as client:
        client.get(
            "/version", headers={"X-Request-Id": "proxied", "X-Forwarded-For": '203.0.113.9"\x80,'.encode("latin-1")}
        )
    assert of_request(json_server, "proxied")["client"].isascii()


def test_probes_that_go_well_are_for_debugging(json_server: Server) -> None:
    with json_server.client() as client:
        for path in ("/health", "/metrics"):
            for method, status, level in (("GET", 200, "DEBUG"), ("POST", 405, "INFO")):
                name = f"{method}-{path[1:]}"
                assert client.request(method, path, headers={"X-Request-Id": name}).status_code == status
                assert of_request(json_server, name)["level"] == level


def test_a_stream_whose_reader_leaves(json_server: Server) -> None:
    body = {"prompt": "Hello", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with (
        json_server.client() as client,
        client.stream(
            "POST", "/v1/completions", json=body, headers={"X-Request-Id": "leaver", "Authorization": f"Bearer {KEY}"}
        ) as response,
    ):
        next(response.iter_lines())
    assert of_request(json_server, "leaver")["status"] == 499


def test_requests_can_be_left_out(launch: Launch, checkpoint: MakeCheckpoint) -> None:
    server = launch(checkpoint(), "--log-format", "json", "--disable-log-requests")
    assert server.get("/version").status_code == 200
    server.stop()
    assert "/version" not in server.stderr
    assert parsed(server.stderr)[-1]["logger"].startswith("uvicorn")


def test_an_engine_that_dies_tells_it_in_json(launch: Launch, checkpoint: MakeCheckpoint) -> None:
    server = launch(checkpoint(), "--log-format", "json")
    children = server.children()
    server.engine().kill()
    server.wait_for_end(children, status=None)
    # Beside the two processes there is one of multiprocessing's, which complains of what a killed one left.
    told = re.sub(r"^\S+resource_tracker\.py:.*\n.*\n", "", server.stderr, flags=re.MULTILINE)
    errors = [line["message"] for line in parsed(told) if line["level"] == "ERROR"]
    assert any("the engine process ended" in message for message in errors)


def test_what_a_record_holds() -> None:
    record = logging.LogRecord("a.b", logging.WARNING, "", 1, 'two\nlines of %s "\ud800"', ("it",), None)
    record.fields = {"status": 3}
    (line,) = parsed(JsonFormatter().format(record))
    assert line["message"] == 'two\nlines of it "\ud800"' and (line["level"], line["status"]) == ("WARNING", 3)
    assert "exception" not in line
    try:
        raise KeyError("why")
    except KeyError:
        record.exc_info = sys.exc_info()
    (line,) = parsed(JsonFormatter().format(record))
    assert "Traceback" in line["exception"] and "why" in line["exception"]
