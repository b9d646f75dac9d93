"""Spans of requests, as a collector gets them."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec
from tests.server.collector import Collector, attributes, collecting, seconds
from tests.server.errors import error_of
from tests.server.launch import ROOT, Launch, Server, data_url, environment, image_part, run_to_end, text_part, user

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
KEY = "key-of-the-server"
SECRET = "Melanocetus"
FAILED = Status.StatusCode.STATUS_CODE_ERROR


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(launch: Launch, checkpoint: MakeCheckpoint, collector: Collector) -> Server:
    spec = CheckpointSpec(max_position_embeddings=16384)
    return launch(
        checkpoint(spec),
        "--served-model-name",
        "vlm",
        "--api-key",
        KEY,
        "--otlp-traces-endpoint",
        collector.url,
        env=SOON,
    )


def new_trace() -> tuple[str, dict[str, str]]:
    """A trace id, and the headers of a request that is part of it."""
    trace_id = uuid4().hex
    return trace_id, {"Authorization": f"Bearer {KEY}", "traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}


def ask(server: Server, path: str, **fields: Any) -> tuple[httpx.Response, str]:
    """An answer and the trace that it is part of."""
    trace_id, headers = new_trace()
    return server.post(path, {"temperature": 0, "max_tokens": 5, **fields}, headers=headers), trace_id


def test_a_chat_with_a_picture(server: Server, collector: Collector, photo_files: list[Path]) -> None:
    began = time.time_ns()
    message = user(image_part(data_url(photo_files[0])), text_part(f"{SECRET}?"))
    fields = {"messages": [message], "n": 2, "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "ignore_eos": True}
    response, trace_id = ask(server, CHAT, **fields)
    spans = collector.wait_for(trace_id, num_spans=3)
    root = next(span for span in spans if span.name == "llm_request")
    assert (root.kind, root.parent_span_id.hex()) == (Span.SpanKind.SPAN_KIND_SERVER, "00f067aa0ba902b7")
    assert root.status.code == Status.StatusCode.STATUS_CODE_UNSET
    assert began < root.start_time_unix_nano < root.end_time_unix_nano < time.time_ns()
    told = attributes(root)
    usage = response.json()["usage"]
    latencies = {name.rpartition(".")[2]: told.pop(name) for name in sorted(told) if "latency" in name}
    assert told == {
        "http.request.method": "POST",
        "url.path": CHAT,
        "http.response.status_code": 200,
        "http.response.header.x-request-id": [response.headers["x-request-id"]],
        "gen_ai.request.id": response.json()["id"],
        "gen_ai.response.model": "vlm",
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
        "gen_ai.usage.completion_tokens": 14,
    }
    assert usage["completion_tokens"] == 14
    assert latencies.keys() == {
        "time_in_queue", "time_to_first_token", "e2e", "time_in_model_prefill", "time_in_model_decode",
        "time_in_model_inference",
    }  # fmt: skip
    assert 0 < latencies["time_in_queue"] < latencies["time_to_first_token"] < latencies["e2e"] < seconds(root)
    parts = latencies["time_in_queue"] + latencies["time_in_model_prefill"] + latencies["time_in_model_decode"]
    assert parts == pytest.approx(latencies["e2e"]) == latencies["time_in_queue"] + latencies["time_in_model_inference"]
    stages = [span for span in spans if span is not root]
    assert [stage.name for stage in stages] == ["fetch_image", "prepare_image"]
    for stage in stages:
        assert stage.parent_span_id == root.span_id
        assert root.start_time_unix_nano < stage.start_time_unix_nano < stage.end_time_unix_nano
        # Before the engine began, which by its times was no later than so long before the end.
        scheduled = root.end_time_unix_nano - 1e9 * (latencies["e2e"] - latencies["time_in_queue"])
        assert stage.end_time_unix_nano <= scheduled + 1e3  # rounding
    assert collector.paths == {"/v1/traces"}
    assert collector.resource["service.name"] == "vlm-server"


ASKED = [
    (CHAT, {"messages": [user("Hi")]}, 1),
    (COMPLETIONS, {"prompt": ["Hi", "Ho"], "n": 2}, 4),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 5, "max_tokens": None}, 1),
    ("/v1/messages", {"messages": [user("Hi")], "model": "vlm"}, 1),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "answers"), ASKED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_way_to_ask(
    server: Server, collector: Collector, path: str, fields: dict[str, Any], answers: int, stream: bool
) -> None:
    before = [server.metric(f"vllm:{kind}_tokens_total") for kind in ("prompt", "generation")]
    response, trace_id = ask(server, path, stream=stream, **fields)
    assert response.status_code == 200, response.text
    (span,) = collector.wait_for(trace_id)
    told = attributes(span)
    after = [server.metric(f"vllm:{kind}_tokens_total") for kind in ("prompt", "generation")]
    assert told["url.path"] == path and told["gen_ai.request.max_tokens"] == 5
    assert told["gen_ai.usage.num_sequences"] == len(told["gen_ai.response.finish_reasons"]) == answers
    used = [told[f"gen_ai.usage.{kind}_tokens"] for kind in ("prompt", "completion")]
    assert used == [new - old for new, old in zip(after, before, strict=True)]
    assert span.status.code != FAILED and 0 < told["gen_ai.latency.e2e"] < seconds(span)


REFUSED = [
    (CHAT, {"messages": [user(SECRET)], "temperature": -1}, 400),
    (CHAT, {"messages": [user(SECRET)], "model": SECRET}, 404),
    (COMPLETIONS, {"prompt": SECRET, "max_tokens": 10**6}, 400),
    (CHAT, {"messages": [user(image_part(f"data:image/png;base64,{SECRET}"), text_part(SECRET))]}, 400),
]


@pytest.mark.parametrize(("path", "fields", "status"), REFUSED)
def test_refused(server: Server, collector: Collector, path: str, fields: dict[str, Any], status: int) -> None:
    response, trace_id = ask(server, path, **fields)
    error_of(response, status)
    spans = collector.wait_for(trace_id, num_spans=2 if "image" in str(fields) else 1)
    for span in spans:
        assert span.status.code == FAILED
    told = attributes(spans[0])
    assert (told["http.response.status_code"], told["error.type"]) == (status, str(status))
    assert "gen_ai.usage.prompt_tokens" not in told


def test_a_client_that_leaves(server: Server, collector: Collector) -> None:
    trace_id, headers = new_trace()
    body = {"messages": [user("Hi")], "max_tokens": 16000, "ignore_eos": True, "stream": True}
    with server.client(headers=headers) as client, client.stream("POST", CHAT, json=body) as response:
        for _ in zip(range(10), response.iter_lines(), strict=False):
            pass
    (span,) = collector.wait_for(trace_id)
    told = attributes(span)
    assert span.status.code == FAILED and span.status.message == "the client left"
    assert (told["http.response.status_code"], told["error.type"]) == (200, "499")
    assert told["gen_ai.usage.completion_tokens"] > 0
    assert "gen_ai.latency.time_to_first_token" in told and "gen_ai.latency.e2e" not in told


def test_an_error_in_mid_stream(launch: Launch, checkpoint: MakeCheckpoint, collector: Collector) -> None:
    """The status was sent long before. What there is to tell is sent even as the server ends for it."""
    spec = CheckpointSpec(max_position_embeddings=16384)
    server = launch(checkpoint(spec), "--otlp-traces-endpoint", collector.url)
    trace_id, headers = new_trace()
    body = {"messages": [user("Hi")], "max_tokens": 16000, "ignore_eos": True, "stream": True}
    children = server.children()
    with server.client(headers=headers) as client, client.stream("POST", CHAT, json=body) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number == 10:
                server.engine().kill()
    server.wait_for_end(children, status=None)
    (span,) = collector.wait_for(trace_id)
    told = attributes(span)
    assert span.status.code == FAILED
    assert (told["http.response.status_code"], told["error.type"]) == (200, "503")


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
NO_PARENTS = [
    [""], ["x"], ["00"], ["00-" + "0" * 32 + "-00f067aa0ba902b7-01"], [f"00-{TRACE}-0000000000000000-01"],
    [f"ff-{TRACE}-00f067aa0ba902b7-01"], [f"00-{TRACE.upper()}-00f067aa0ba902b7-01"], [f"00-{TRACE}-00f067aa0ba902b7"],
    [f"00-{TRACE}-00f067aa0ba902b7-01-more"], [f"00-{TRACE}-00f067aa0ba902b7-zz"], ["00-" + "\xff" * 32 + "-1-01"],
    ["-" * 30_000], [f"00-{TRACE}-00f067aa0ba902b7-01", f"00-{TRACE}-00f067aa0ba902b8-01"],
]  # fmt: skip


@pytest.mark.parametrize("values", NO_PARENTS, ids=lambda values: ascii(values)[:40])
def test_hostile_parents_are_ignored(server: Server, collector: Collector, values: list[str]) -> None:
    name = uuid4().hex
    headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"x-request-id", name.encode())]
    headers += [(b"traceparent", value.encode("latin-1")) for value in values]
    response = server.post(CHAT, {"messages": [user("Hi")], "max_tokens": 1}, headers=headers)
    assert response.status_code == 200
    span = wait_for_request(collector, name)
    assert span.parent_span_id == b"" and span.trace_id.hex() != TRACE


@pytest.mark.parametrize(
    ("state", "kept"),
    [("a=1", "a=1"), ("a=" + "x" * 600, ""), (",".join(f"k{i}=" for i in range(99)), ""), ("=,;=\xff,a", "")],
    ids=lambda value: ascii(value)[:20],
)
def test_states_of_traces(server: Server, collector: Collector, state: str, kept: str) -> None:
    trace_id, headers = new_trace()
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in {**headers, "tracestate": state}.items()]
    assert server.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 1}, headers=encoded).status_code == 200
    (span,) = collector.wait_for(trace_id)
    assert span.trace_state == kept


def test_who_makes_no_spans(server: Server, collector: Collector) -> None:
    """A trace that its caller does not sample, paths that answer nothing, and clients without a key."""
    trace_id, headers = new_trace()
    unsampled = {**headers, "traceparent": headers["traceparent"][:-1] + "0"}
    assert server.post(CHAT, {"messages": [user("Hi")], "max_tokens": 1}, headers=unsampled).status_code == 200
    assert server.post("/tokenize", {"prompt": "Hi"}, headers=headers).status_code == 200
    assert server.get("/health", headers=headers).status_code == 200
    del headers["Authorization"]
    error_of(server.post(CHAT, {"messages": [user("Hi")]}, headers=headers), 401)
    _, later = ask(server, CHAT, messages=[user("Hi")])
    collector.wait_for(later)
    time.sleep(0.3)
    assert trace_id not in {span.trace_id.hex() for span in collector.spans}


def test_nothing_of_what_was_said_is_sent(server: Server, collector: Collector) -> None:
    response, trace_id = ask(server, CHAT, messages=[user(f"{SECRET} and more")], max_tokens=40, ignore_eos=True)
    collector.wait_for(trace_id)
    said = response.json()["choices"][0]["message"]["content"]
    sent = b"".join(collector.bodies)
    assert len(said) > 10 and said.encode() not in sent
    assert SECRET.encode() not in sent and KEY.encode() not in sent
    assert trace_id in {span.trace_id.hex() for span in collector.spans}


def test_the_last_spans_are_sent_at_the_end(launch: Launch, checkpoint: MakeCheckpoint, collector: Collector) -> None:
    """And the SDK's variables hold."""
    env = {"OTEL_BSP_SCHEDULE_DELAY": "60000", "OTEL_RESOURCE_ATTRIBUTES": "service.name=mine,place=here"}
    server = launch(checkpoint(), "--otlp-traces-endpoint", f"{collector.url}/v1/elsewhere", env=env)
    _, trace_id = ask(server, CHAT, messages=[user("Hi")])
    server.stop()
    collector.wait_for(trace_id, within=0)
    assert (collector.resource["service.name"], collector.resource["place"]) == ("mine", "here")
    assert "/v1/elsewhere" in collector.paths
    collector.paths.discard("/v1/elsewhere")


@pytest.fixture(params=["nobody listens", "nobody answers"])
def dead_end(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a collector that is down."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "nobody answers":
            listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_collector_that_is_down(launch: Launch, checkpoint: MakeCheckpoint, dead_end: str) -> None:
    env = {
        **SOON,
        "OTEL_BSP_MAX_QUEUE_SIZE": "8",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
    }
    server = launch(checkpoint(), "--otlp-traces-endpoint", f"{dead_end}/v1/traces?key={SECRET}", env=env)
    began = time.monotonic()
    for _ in range(40):  # five times as many as have room
        response, _ = ask(server, COMPLETIONS, prompt="Hi", max_tokens=1)
        assert response.status_code == 200
    assert time.monotonic() - began < 10
    end = time.monotonic() + 10
    while not (told := re.findall(r"WARNING server.tracing: traces: .+", server.stderr)):
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1.5)  # in which there would be more to complain about
    assert len(told) == len(re.findall(r"traces: ", server.stderr)) == 1
    assert "Traceback" not in server.stderr and SECRET not in server.stderr
    began = time.monotonic()
    server.stop(signal.SIGTERM)
    assert time.monotonic() - began < 6


def test_without_the_packages(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry.exporter'] = None\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    flags = ["--model", str(checkpoint()), "--log-level", "error", "--port", "0"]
    ended = run_to_end(*flags, "--otlp-traces-endpoint", "http://127.0.0.1:1", env=env)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: --otlp-traces-endpoint ") and ended.stderr.count("\n") == 1, ended.stderr
    (extra,) = re.findall(r"pip install '\.\[(\w+)\]'", ended.stderr)
    assert re.search(rf'^{extra} = \["opentelemetry', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_without_the_flag_nothing_is_imported() -> None:
    code = "import sys, server.run; print(*sorted(name for name in sys.modules if name.startswith('opentelemetry')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not re.findall(r"opentelemetry\.(?:sdk|exporter|proto)\S*", done.stdout)


def test_a_variable_that_is_wrong(checkpoint: MakeCheckpoint) -> None:
    env = {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "9999"}
    flags = ["--model", str(checkpoint()), "--log-level", "error", "--port", "0"]
    ended = run_to_end(*flags, "--otlp-traces-endpoint", "http://127.0.0.1:1", env=env)
    assert ended.returncode == 2 and "OTEL_" in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


def wait_for_request(collector: Collector, name: str) -> Span:
    """The span of a request, by the name that it had in its header."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for span in tuple(collector.spans):
            if attributes(span).get("http.response.header.x-request-id") == [name]:
                return span
        time.sleep(0.02)
    raise AssertionError("no span came")
