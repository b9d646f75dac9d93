"""Prometheus metrics under the names that dashboards for vLLM know."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import SchedulerStats
from engine.outputs import Delta

disable_created_metrics()  # type: ignore[no-untyped-call]

_SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN = (0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1, 2)
_LONG = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class Metrics:
    """Counts what the API process sees; queues and caches are read from the engine's newest statistics."""

    def __init__(self, model_name: str, stats: Callable[[], SchedulerStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, stats))
        self._model_name = model_name
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens, image tokens counted in.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self._success = Counter(
            "vllm:request_success",
            "Answers that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _SHORT)
        self._inter_token = self._histogram("vllm:inter_token_latency_seconds", "Token to token.", _BETWEEN)
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _LONG)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Arrival to first step.", _LONG)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "First step to first token.", _LONG)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First token to last.", _LONG)
        self._fetch = self._histogram("vllm:image_fetch_seconds", "Fetching one image.", _SHORT)
        self._image_decode = self._histogram("vllm:image_decode_seconds", "Decoding one image.", _SHORT)
        self._image_prepare = self._histogram(
            "vllm:image_prepare_seconds", "Scaling and cropping one decoded image.", _SHORT
        )

    def prompt(self, num_tokens: int) -> None:
        """A request was accepted."""
        self._prompt_tokens.inc(num_tokens)

    def delta(self, delta: Delta, since: float, now: float) -> None:
        """Tokens came for an answer whose last ones came at `since`; 0 for the first."""
        count = len(delta.token_ids)
        self._generation_tokens.inc(count)
        if count and not since:
            # A reader that came late finds the first token merged with others.
            since, count = delta.metrics.first_token_time, count - 1
            self._first_token.observe(since - delta.metrics.arrival_time)
        for _ in range(count):
            self._inter_token.observe((now - since) / count)
        if delta.finish_reason is not None:
            self._finished(delta)

    def aborted(self, count: int) -> None:
        """Answers were given up before their end, mostly because their client went away."""
        if count:
            self._success.labels(self._model_name, "abort").inc(count)

    def image_fetched(self, seconds: float) -> None:
        """An image was fetched."""
        self._fetch.observe(seconds)

    def image_decoded(self, seconds: float) -> None:
        """An image was decoded."""
        self._image_decode.observe(seconds)

    def image_prepared(self, seconds: float) -> None:
        """A decoded image was made what the model takes."""
        self._image_prepare.observe(seconds)

    def render(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self._registry)

    def _finished(self, delta: Delta) -> None:
        times = delta.metrics
        self._success.labels(self._model_name, delta.finish_reason).inc()
        self._e2e.observe(times.finished_time - times.arrival_time)
        if times.first_scheduled_time:
            self._queue.observe(max(0.0, times.first_scheduled_time - times.arrival_time))
            self._prefill.observe(max(0.0, times.first_token_time - times.first_scheduled_time))
            self._decode.observe(max(0.0, times.finished_time - times.first_token_time))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
        return metric.labels(self._model_name)


class _EngineCollector(Collector):
    """The engine core's state at the time of the scrape."""

    def __init__(self, model_name: str, stats: Callable[[], SchedulerStats]) -> None:
        self._labels = [model_name]
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        stats = self._stats()
        yield self._gauge("vllm:num_requests_running", "Sequences that run.", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait.", stats.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", stats.kv_cache_usage)
        yield self._counter("vllm:prefix_cache_queries", "Tokens looked up.", stats.prefix_cache_queries)
        yield self._counter("vllm:prefix_cache_hits", "Tokens found.", stats.prefix_cache_hits)
        yield self._counter("vllm:num_preemptions", "Preemptions.", stats.num_preemptions)
        yield self._counter("vllm:image_encoder_seconds", "Time spent encoding.", stats.encoder_seconds)
        yield self._counter("vllm:image_encoder_images", "Images encoded.", stats.encoder_images)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric(self._labels, value)
        return family
