"""OpenTelemetry: a span for each request that asks for answers, under the names that vLLM gives its attributes.

Needs the packages of the extra `otel`, and is imported with `--otlp-traces-endpoint` only.
"""

import logging
import re
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.outputs import RequestMetrics
from server.notes import NOTES, Notes
from server.version import program_version

logger = logging.getLogger(__name__)

_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_LONGEST_TRACESTATE = 512
"""Characters; W3C asks for no more to be passed on."""
_FAREWELL_SECONDS = 2.0
"""For what is left to be sent at the end."""
_SECONDS_BETWEEN_COMPLAINTS = 60.0
_LONGEST_COMPLAINT = 400
_CLIENT_CLOSED_REQUEST = 499


class Traces:
    """Makes spans, and sends them in batches from a thread of its own. The SDK's variables `OTEL_…` hold.

    Args:
        endpoint: the collector's URL; without a path it is OTLP's own, `/v1/traces`.

    Raises:
        ValueError: a variable of the SDK has a value that it does not take.
    """

    def __init__(self, endpoint: str) -> None:
        _complain_seldom()
        resource = Resource.create({SERVICE_NAME: "vlm-server", SERVICE_VERSION: program_version()})
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,  # which would wait for long; see `close`
        )
        parts = urlsplit(endpoint)
        if parts.path in ("", "/"):
            endpoint = parts._replace(path="/v1/traces").geturl()
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("vlm-server", program_version())

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Trace what passes on its way to an application."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            is_traced = scope["type"] == "http" and scope["method"] == "POST" and _path(scope) in _PATHS
            await (self._answer(app, scope, receive, send) if is_traced else app(scope, receive, send))

        return traced

    def close(self) -> None:
        """Send what is left, if that takes no time to speak of."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(_FAREWELL_SECONDS)

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        status, is_complete = 500, False  # unless it is answered

        async def send_noted(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                is_complete = not message.get("more_body", False)
            await send(message)

        notes, clock = Notes(), _Clock()
        token = NOTES.set(notes)
        try:
            await app(scope, receive, send_noted)
        finally:
            NOTES.reset(token)
            if status < 400 and not is_complete:
                notes.failure = notes.failure or _CLIENT_CLOSED_REQUEST
            _make_spans(self._tracer, scope, notes, status, clock)


class _Clock:
    """Nanoseconds since 1970, as spans want them, of times of `time.monotonic()`."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._offset = time.time_ns() - int(self.began * 1e9)

    def at(self, moment: float) -> int:
        """When that was."""
        return self._offset + int(moment * 1e9)


def _make_spans(tracer: Tracer, scope: Scope, notes: Notes, status: int, clock: _Clock) -> None:
    """All at once when the request has ended, since only then it is known what to tell of it."""
    span = tracer.start_span(
        "llm_request",
        _parent(scope),
        SpanKind.SERVER,
        {
            "http.request.method": "POST",
            "url.path": _path(scope),
            "http.response.status_code": status,
            "http.response.header.x-request-id": [scope["request_id"]],
            **_of_request(notes),
            **_of_answers([times for times, _ in notes.answers.values()]),
        },
        start_time=clock.at(clock.began),
    )
    if reasons := [reason for _, (_, reason) in sorted(notes.answers.items()) if reason is not None]:
        span.set_attribute("gen_ai.response.finish_reasons", reasons)
    if failure := notes.failure or (status if status >= 400 else 0):
        span.set_attribute("error.type", str(failure))
        # Not the message, which may quote what the client sent.
        span.set_status(Status(StatusCode.ERROR, _phrase(failure)))
    _make_stages(tracer, span, notes, clock)
    span.end(clock.at(time.monotonic()))


def _make_stages(tracer: Tracer, parent: Span, notes: Notes, clock: _Clock) -> None:
    inside = set_span_in_context(parent)
    for stage in notes.stages:
        child = tracer.start_span(stage.name, inside, start_time=clock.at(stage.began))
        if not stage.is_done:
            child.set_status(StatusCode.ERROR)
        child.end(clock.at(stage.ended))


def _of_request(notes: Notes) -> dict[str, AttributeValue]:
    """What was asked for and how much it took; nothing for a request that did not get to the engine."""
    if notes.params is None or notes.usage is None:
        return {}
    told: dict[str, AttributeValue] = {
        "gen_ai.request.id": notes.name,
        "gen_ai.response.model": notes.model,
        "gen_ai.request.temperature": notes.params.temperature,
        "gen_ai.request.top_p": notes.params.top_p,
        "gen_ai.request.n": notes.params.n,
        "gen_ai.usage.num_sequences": len(notes.answers),
        "gen_ai.usage.prompt_tokens": notes.usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": notes.usage.completion_tokens,
    }
    if notes.params.max_tokens is not None:
        told["gen_ai.request.max_tokens"] = notes.params.max_tokens
    return told


def _of_answers(answers: list[RequestMetrics]) -> dict[str, AttributeValue]:
    """Seconds, from the first answer that reached each point; the end is that of the last."""
    return {f"gen_ai.latency.{name}": seconds for name, seconds in _latencies(answers)}


def _latencies(answers: list[RequestMetrics]) -> Iterator[tuple[str, float]]:
    arrived = min((times.arrival_time for times in answers), default=0.0)
    scheduled = min((times.first_scheduled_time for times in answers if times.first_scheduled_time), default=0.0)
    first = min((times.first_token_time for times in answers if times.first_token_time), default=0.0)
    is_finished = bool(answers) and all(times.finished_time for times in answers)
    finished = max(times.finished_time for times in answers) if is_finished else 0.0
    if scheduled:
        yield "time_in_queue", scheduled - arrived
    if first:
        yield "time_to_first_token", first - arrived
    if first and scheduled:
        yield "time_in_model_prefill", first - scheduled
    if finished:
        yield "e2e", finished - arrived
    if finished and first:
        yield "time_in_model_decode", finished - first
    if finished and scheduled:
        yield "time_in_model_inference", finished - scheduled


def _parent(scope: Scope) -> Context:
    """What a client says that its request is part of; what is no W3C trace context is as good as nothing."""
    found: dict[str, list[str]] = {"traceparent": [], "tracestate": []}
    for name, value in scope["headers"]:
        if name in (b"traceparent", b"tracestate"):
            found[name.decode()].append(value.decode("latin-1"))
    carrier = {}
    if len(found["traceparent"]) == 1:
        carrier["traceparent"] = found["traceparent"][0]
    state = ",".join(found["tracestate"])
    if len(state) <= _LONGEST_TRACESTATE:
        carrier["tracestate"] = state
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _phrase(status: int) -> str:
    return "the client left" if status == _CLIENT_CLOSED_REQUEST else HTTPStatus(status).phrase


class _Complaints(logging.Handler):
    """Passes a line of the SDK's on now and then: a collector that is down would fill the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._next = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on, or drop it."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _SECONDS_BETWEEN_COMPLAINTS
        line = re.sub(r"\?\S+", "?…", " ".join(record.getMessage().split()))  # a URL's query may hold a key
        logger.warning("traces: %s", line[:_LONGEST_COMPLAINT])


def _complain_seldom() -> None:
    library = logging.getLogger("opentelemetry")
    library.handlers = [_Complaints()]
    library.propagate = False
