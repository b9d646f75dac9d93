"""A server from its start to its end, and what it tells about itself in between."""

import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec
from tests.server.errors import check_error, error_of
from tests.server.launch import Launch, Server, data_url, image_part, run_to_end, user

# Its context holds answers that take long enough to be interrupted.
LONG = CheckpointSpec(max_position_embeddings=16384)
LONGEST = {"max_tokens": 16000, "ignore_eos": True, "temperature": 0}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SUCCESS = "vllm:request_success_total"
RUNNING = "vllm:num_requests_running"


@pytest.fixture(scope="module")
def server(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    return launch(checkpoint(LONG), "--served-model-name", "vlm", "org/other", "--max-num-seqs", "4")


@pytest.fixture(scope="module")
def locked(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    """Asks for a key."""
    return launch(
        checkpoint(LONG), "--api-key", "flag-key", "second-key", "--disable-log-requests",
        env={"VLLM_API_KEY": "environment-key"},
    )  # fmt: skip


class Stream:
    """A stream that is read in a thread of its own, to its end."""

    def __init__(self, server: Server, **fields: Any) -> None:
        self.lines: list[str] = []
        self.begun = threading.Event()
        self._body = {"messages": [user("Tell me a story.")], "stream": True, "temperature": 0} | fields
        self._thread = threading.Thread(target=self._read, args=(server,))
        self._thread.start()
        assert self.begun.wait(20)

    def _read(self, server: Server) -> None:
        with server.client() as client, client.stream("POST", CHAT, json=self._body) as response:
            for line in response.iter_lines():
                if line:
                    self.lines.append(line.removeprefix("data: "))
                if len(self.lines) > 3:
                    self.begun.set()

    def rest(self, seconds: float) -> list[str]:
        """All of its events, once it has ended."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the stream does not end"
        return self.lines


def test_health_and_version(server: Server) -> None:
    assert server.get("/health").status_code == 200
    versions = server.get("/version").json()
    assert versions.keys() >= {"version", "torch", "transformers"}
    assert server.stdout.count("\n") == 1
    assert server.get("/openapi.json").json()["info"]["version"] == versions["version"]
    assert server.get("/docs").status_code == 200


def test_models(server: Server) -> None:
    assert server.names == ["vlm", "org/other"]
    page = server.get("/v1/models").json()
    assert page["object"] == "list" and [entry["id"] for entry in page["data"]] == server.names
    for entry in page["data"]:
        assert entry["object"] == "model" and entry["max_model_len"] == 16384
        assert isinstance(entry["created"], int) and entry["owned_by"]
        assert server.get(f"/v1/models/{entry['id']}").json() == entry
    check_error(server.get("/v1/models/absent"), "model", "'absent'", status=404)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == server.names
        assert client.models.retrieve("org/other").id == "org/other"


def test_each_served_name_answers(server: Server) -> None:
    for name in (*server.names, None):
        body = {"messages": [user("Hi")], "max_tokens": 1} | ({} if name is None else {"model": name})
        assert server.post(CHAT, body).json()["model"] == (name or "vlm")


def test_metrics(server: Server, photo_files: list[Path]) -> None:
    def read() -> dict[str, float]:
        names = ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total",
                 "prefix_cache_hits_total", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
                 "e2e_request_latency_seconds_count", "request_queue_time_seconds_count",
                 "request_prefill_time_seconds_count", "request_decode_time_seconds_count",
                 "image_decode_seconds_count", "image_encoder_images_total", "image_encoder_seconds_total")  # fmt: skip
        found = {name: server.metric(f"vllm:{name}", model_name="vlm") for name in names}
        for reason in ("length", "stop"):
            found[reason] = server.metric("vllm:request_success_total", finished_reason=reason)
        return found

    before = read()
    prompt = [
        user(image_part(data_url(photo_files[0])), {"type": "text", "text": "Some words that fill a block. " * 2})
    ]
    usage = []
    for fields in ({}, {}, {"stop": [" "], "max_tokens": 100}, {"n": 2}):
        response = server.post(CHAT, {"messages": prompt, "max_tokens": 5, "temperature": 0, **fields})
        assert response.status_code == 200
        usage.append(response.json()["usage"])
    server.wait_for_metric(RUNNING, lambda value: value == 0)
    after = read()
    moved = {name: after[name] - before[name] for name in before}
    assert moved["prompt_tokens_total"] == sum(one["prompt_tokens"] for one in usage)
    assert moved["generation_tokens_total"] == sum(one["completion_tokens"] for one in usage)
    assert (moved["length"], moved["stop"]) == (4, 1)
    assert moved["e2e_request_latency_seconds_count"] == moved["time_to_first_token_seconds_count"] == 5
    for name in ("queue", "prefill", "decode"):
        assert moved[f"request_{name}_time_seconds_count"] == 5
    assert moved["prefix_cache_queries_total"] >= moved["prefix_cache_hits_total"] > 0
    assert moved["image_decode_seconds_count"] == 1  # it is the same picture every time
    assert moved["image_encoder_images_total"] == 1  # the other three came from the caches
    assert moved["image_encoder_seconds_total"] > 0 and moved["inter_token_latency_seconds_count"] > 0
    text = server.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    for name in (RUNNING, "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert f'{name}{{model_name="vlm"}} 0.0\n' in text.text
        assert f"# TYPE {name} gauge" in text.text
    samples = [line for line in text.text.splitlines() if not line.startswith("#")]
    assert all('model_name="vlm"' in line for line in samples)


def test_metrics_under_way(server: Server) -> None:
    streams = [Stream(server, max_tokens=1500) for _ in range(2)]
    assert server.metric(RUNNING) == 2
    assert 0 < server.metric("vllm:kv_cache_usage_perc") < 1
    for stream in streams:
        assert stream.rest(30)[-1] == "[DONE]"
    server.wait_for_metric(RUNNING, lambda value: value == 0)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_client_that_leaves_a_stream(server: Server, path: str) -> None:
    aborted = server.metric(SUCCESS, finished_reason="abort")
    body = {"messages": [user("Hi")], "prompt": "Hi", "stream": True, "n": 2, **LONGEST}
    with server.client() as client, client.stream("POST", path, json=body) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number > 10:
                assert server.metric(RUNNING) == 2
                break
    server.wait_for_metric(RUNNING, lambda value: value == 0, seconds=2)
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.metric(SUCCESS, finished_reason="abort") == aborted + 2


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_client_that_leaves_before_its_answer(server: Server, path: str) -> None:
    body = {"messages": [user("Hi")], "prompt": ["Hi", "Ho"], **LONGEST}
    with server.client() as client, ThreadPoolExecutor() as pool:
        asking = pool.submit(client.post, path, json=body, timeout=1)
        server.wait_for_metric(RUNNING, lambda value: value > 0)
        with pytest.raises(httpx.ReadTimeout):
            asking.result()
    server.wait_for_metric(RUNNING, lambda value: value == 0, seconds=2)
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.post(path, {**body, "max_tokens": 1}).status_code == 200


def test_a_port_that_is_taken(server: Server, checkpoint: MakeCheckpoint) -> None:
    ended = run_to_end("--model", str(checkpoint(LONG)), "--port", str(server.port))
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1 and f"127.0.0.1:{server.port}" in ended.stderr, ended.stderr


def test_a_model_that_cannot_be_loaded_leaves_no_socket(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(checkpoint(LONG), broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    ended = run_to_end("--model", str(broken), "--uds", str(tmp_path / "socket"))
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "socket").exists()


def test_an_engine_that_cannot_start_leaves_one_line(checkpoint: MakeCheckpoint) -> None:
    """And nothing that the system would have to clean up, and say so."""
    ended = run_to_end("--model", str(checkpoint(LONG)), "--kv-cache-memory-bytes", "1", "--port", "0")
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if " INFO " not in line] == [ended.stderr.splitlines()[-1]]
    assert ended.stderr.splitlines()[-1].startswith("error: --kv-cache-memory-bytes is 1")


GUARDED = [
    ("GET", "/v1/models"), ("GET", "/v1/models/x"), ("POST", CHAT), ("POST", COMPLETIONS), ("GET", "/v1"),
    ("GET", "/v1/"), ("GET", "/v1/nothing/at/all"), ("DELETE", CHAT), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("GET", "//v1/models"), ("GET", "/v1//models"), ("GET", "/%761/models"), ("POST", "/tokenize/"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_guarded_paths(locked: Server, method: str, path: str) -> None:
    content = None if method == "GET" else b'{"messages": [{"role": "user", "content": "x"}]}'
    response = httpx.request(method, f"{locked.url}{path}", content=content, trust_env=False)
    if path.startswith("//"):
        assert response.status_code in (401, 404)  # no such path: nothing is behind it
        return
    error = error_of(response, 401)
    assert error["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version"])
def test_open_paths(locked: Server, path: str) -> None:
    assert locked.get(path).status_code == 200


KEYS = [
    ("Bearer flag-key", 200), ("bearer second-key", 200), ("Bearer environment-key", 200),
    ("Bearer wrong", 401), ("Bearer flag-key2", 401), ("Bearer flag-ke", 401), ("Bearer", 401),
    ("flag-key", 401), ("Basic flag-key", 401), ("", 401), ("Bearer flag-key second-key", 401),
]  # fmt: skip


@pytest.mark.parametrize(("header", "status"), KEYS)
def test_keys(locked: Server, header: str, status: int) -> None:
    response = locked.get("/v1/models", headers={"Authorization": header})
    assert response.status_code == status
    if status == 401:
        assert "flag-key" not in error_of(response, 401)["message"]


def test_openai_client_with_a_key(locked: Server) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="flag-key", max_retries=0) as client:
        assert client.completions.create(model=locked.names[0], prompt="x", max_tokens=1).usage is not None
    wrong = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="no", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    assert "flag-key" not in locked.stderr + locked.stdout
    assert "POST" not in locked.stderr  # --disable-log-requests


def test_bodies_that_come_in_together_take_no_more_than_four_of_the_largest(
    launch: Launch, checkpoint: MakeCheckpoint
) -> None:
    limit = 100_000
    server = launch(checkpoint(), "--max-request-bytes", str(limit))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {limit}\r\n\r\n".encode()
    address = httpx.URL(server.url)
    question = {"messages": [user("Hi")], "max_tokens": 1}
    with ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(socket.create_connection((address.host, address.port)))
            client.sendall(head + b" " * (limit - 1))
        end = time.monotonic() + 10
        while (refused := server.post(CHAT, question)).status_code == 200:
            assert time.monotonic() < end
        assert "large requests" in error_of(refused, 503)["message"]
        assert int(refused.headers["retry-after"]) > 0
        assert server.get("/health").status_code == 200
    end = time.monotonic() + 10
    while server.post(CHAT, question).status_code != 200:
        assert time.monotonic() < end


def test_one_request_fills_half_of_the_queue_at_most(server: Server) -> None:
    """Of a place for each of 4 that run and of 1,024 that wait."""
    refused = server.post(COMPLETIONS, {"prompt": ["a"] * 103, "n": 5, "max_tokens": 1})
    check_error(refused, "n", 515, 514)
    assert server.post(COMPLETIONS, {"prompt": ["a"] * 102, "n": 5, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [user("Hi")], "logprobs": True, "top_logprobs": 20}),
        (COMPLETIONS, {"prompt": "Hi", "logprobs": 20}),
    ],
)
def test_log_probabilities_of_an_answer_have_a_limit(server: Server, path: str, fields: dict[str, Any]) -> None:
    check_error(server.post(path, {**fields, "n": 4, "max_tokens": 12_500}), "logprobs", 12_500 * 4 * 21, 1 << 20)


def test_a_body_is_forgotten_once_its_prompt_is_made(server: Server) -> None:
    """However long the answer takes, or waits for its turn."""
    asked = {"messages": [user("Hi")], "user": "x" * 30_000_000, "stream": True}
    server.post(CHAT, {**asked, "max_tokens": 1})  # what the server takes for one of them, it has now
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    with ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(server.client())
            answer = stack.enter_context(client.stream("POST", CHAT, json={**asked, **LONGEST}))
            assert answer.status_code == 200
        assert process.memory_info().rss - before < 4 * 30_000_000
    server.wait_for_metric(RUNNING, lambda value: value == 0)


def test_a_full_queue_and_an_orderly_end(launch: Launch, checkpoint: MakeCheckpoint) -> None:
    server = launch(checkpoint(LONG), "--max-num-seqs", "1", "--max-num-queued-reqs", "1")
    with ThreadPoolExecutor() as pool:
        running = Stream(server, max_tokens=4000)
        waiting = pool.submit(server.post, CHAT, {"messages": [user("Hi")], "max_tokens": 3})
        server.wait_for_metric("vllm:num_requests_waiting", lambda value: value == 1)
        refused = server.post(CHAT, {"messages": [user("Hi")], "max_tokens": 3})
        error_of(refused, 503)
        assert int(refused.headers["retry-after"]) > 0
        assert server.get("/health").status_code == 200

        children = server.children()
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 5
        while (health := server.get("/health")).status_code == 200:
            assert time.monotonic() < end
        error_of(health, 503)
        for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
            late = server.post(path, {"messages": [user("Hi")], "prompt": "Hi", "max_tokens": 3, "tokens": [1]})
            assert "shutting down" in error_of(late, 503)["message"]
        lines = running.rest(60)
        assert lines[-1] == "[DONE]"
        assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"
        answer = waiting.result(20)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
    server.wait_for_end(children, status=0)
    with pytest.raises(httpx.TransportError):
        server.get("/health")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_end_that_does_not_wait(launch: Launch, checkpoint: MakeCheckpoint, number: signal.Signals) -> None:
    server = launch(checkpoint(LONG), "--shutdown-timeout", "0.5")
    with ThreadPoolExecutor() as pool:
        plain = pool.submit(server.post, CHAT, {"messages": [user("Hi")], **LONGEST})
        stream = Stream(server, **LONGEST)
        server.wait_for_metric(RUNNING, lambda value: value == 2)
        children = server.children()
        begun = time.monotonic()
        server.process.send_signal(number)
        check_end_by_error(stream.rest(10), "shutting down")
        assert "shutting down" in error_of(plain.result(10), 503)["message"]
        server.wait_for_end(children, status=0)
    assert 0.5 <= time.monotonic() - begun < 10


def check_end_by_error(lines: list[str], word: str) -> None:
    assert lines[-1] == "[DONE]"
    error = json.loads(lines[-2])
    assert error["error"].keys() == {"message", "type", "param", "code"} and word in error["error"]["message"]
    assert all("error" not in json.loads(line) for line in lines[:-2])


def test_an_engine_that_dies(launch: Launch, checkpoint: MakeCheckpoint) -> None:
    server = launch(checkpoint(LONG))
    with ThreadPoolExecutor() as pool:
        stream = Stream(server, **LONGEST)
        plain = pool.submit(server.post, CHAT, {"messages": [user("Hi")], **LONGEST})
        server.wait_for_metric(RUNNING, lambda value: value == 2)
        children = server.children()
        server.engine().kill()
        check_end_by_error(stream.rest(5), "engine")
        error_of(plain.result(5), 503)
        for ask in (lambda: server.get("/health"), lambda: server.post(CHAT, {"messages": [user("Hi")]})):
            check_unavailable(ask)
        server.wait_for_end(children, status=None)
    assert "Traceback" not in server.stderr


def test_an_engine_that_stands_still(launch: Launch, checkpoint: MakeCheckpoint) -> None:
    """As soon as it goes on, so does the server."""
    server = launch(checkpoint(LONG))
    body = {"messages": [user("Hi")], "temperature": 0, "max_tokens": 5}
    before = server.post(CHAT, body).json()["choices"]
    engine = server.engine()
    engine.suspend()
    end = time.monotonic() + 30
    while server.get("/health").status_code == 200:
        assert time.monotonic() < end
        time.sleep(0.2)
    for ask in (lambda: server.get("/health"), lambda: server.post(CHAT, body)):
        assert "does not respond" in error_of(ask(), 503)["message"]
    engine.resume()
    while server.get("/health").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert server.post(CHAT, body).json()["choices"] == before


def test_other_sites_are_refused_in_json(launch: Launch, checkpoint: MakeCheckpoint) -> None:
    server = launch(checkpoint(LONG), "--allowed-origins", "https://mine.example")
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with server.client() as client:
        fine = client.options(CHAT, headers={"Origin": "https://mine.example", **ask})
        assert fine.status_code == 200 and fine.headers["access-control-allow-origin"] == "https://mine.example"
        refused = client.options(CHAT, headers={"Origin": "https://other.example", **ask})
        assert "origin" in error_of(refused, 400)["message"]
        assert "access-control-allow-origin" not in refused.headers


def test_requests_have_names(server: Server) -> None:
    with server.client() as client:
        for path in ("/health", "/v1/nothing"):
            named = client.get(path, headers={"X-Request-Id": "mine-1"})
            assert named.headers["x-request-id"] == named.headers["request-id"] == "mine-1"
            made = [client.get(path, headers={"X-Request-Id": bad}).headers["x-request-id"] for bad in ("", "a" * 129)]
            assert len(set(made)) == 2 and all(name.startswith("req_") for name in made)
        assert client.head("/health").status_code == 200


def test_no_redirect_repeats_what_a_client_calls_its_host(server: Server) -> None:
    with server.client() as client:
        response = client.get("/health/", headers={"Host": "other.example"}, follow_redirects=False)
        error_of(response, 404)


def check_unavailable(ask: Callable[[], httpx.Response]) -> None:
    try:
        response = ask()
    except httpx.TransportError:
        return
    error_of(response, 503)


@pytest.mark.parametrize("seconds", [0, 1, 2, 4])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts(
    launch: Launch, checkpoint: MakeCheckpoint, seconds: int, number: signal.Signals
) -> None:
    """While libraries are imported, or the model is loaded."""
    server = launch(checkpoint(LONG), wait=False)
    end = time.monotonic() + 60
    while not server.children():
        assert time.monotonic() < end and server.process.poll() is None, server.stderr
        time.sleep(0.02)
    time.sleep(seconds)
    children = server.children()
    begun = time.monotonic()
    server.process.send_signal(number)
    server.wait_for_end(children, status=0)
    assert time.monotonic() - begun < 8
    assert "Traceback" not in server.stderr


def test_a_killed_server_takes_its_engine_along(locked: Server) -> None:
    children = locked.children()
    locked.process.kill()
    locked.wait_for_end(children, status=-signal.SIGKILL)
