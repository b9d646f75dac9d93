"""A collector of traces: an HTTP server that takes OTLP as protobuf."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


def plain(value: AnyValue) -> Any:
    """As Python has it."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(one) for one in value.array_value.values]
    return getattr(value, str(kind))


def attributes(span: Span) -> dict[str, Any]:
    """Of a span."""
    return {pair.key: plain(pair.value) for pair in span.attributes}


def seconds(span: Span) -> float:
    """How long it took."""
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


@dataclass
class Collector:
    """What came."""

    url: str
    spans: list[Span] = field(default_factory=list)
    resource: dict[str, Any] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    def wait_for(self, trace_id: str, *, num_spans: int = 1, within: float = 10.0) -> list[Span]:
        """The spans of a trace, in the order of their beginning."""
        end = time.monotonic() + within
        while True:
            found = [span for span in self.spans if span.trace_id.hex() == trace_id]
            if len(found) >= num_spans:
                return sorted(found, key=lambda span: span.start_time_unix_nano)
            assert time.monotonic() < end, f"{len(found)} spans of {num_spans} came"
            time.sleep(0.02)


@contextmanager
def collecting() -> Iterator[Collector]:
    """Listens in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.bodies.append(body)
            collector.paths.add(self.path)
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                collector.resource = {pair.key: plain(pair.value) for pair in group.resource.attributes}
                for scope in group.scope_spans:
                    collector.spans += scope.spans
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    collector = Collector(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield collector
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()
