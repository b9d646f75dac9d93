"""The engine's inner loop: schedule, execute, update."""

import contextlib
import logging
from collections import deque

from llguidance import LLMatcher

from engine.config import EngineConfig
from engine.core.encoder_cache import EncoderCache
from engine.core.kv_cache import KVCache
from engine.core.profiler import StepProfiler
from engine.core.request import Request
from engine.core.scheduler import IMAGES_AT_ONCE, Scheduler
from engine.messages import EngineOutput, EngineOutputs, EngineRequest, SchedulerStats
from engine.models.rotary import long_context_start
from engine.step import SchedulerOutput
from engine.worker.model_runner import ModelRunner
from engine.worker.pending import PendingStep

logger = logging.getLogger(__name__)


class EngineCore:
    """Owns the scheduler and the model runner; knows neither text nor clients."""

    def __init__(self, config: EngineConfig) -> None:
        self.runner = ModelRunner(config)
        kv_cache = KVCache(
            self.runner.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        feature_size = 0 if config.vision is None else config.vision.feature_size
        self.scheduler = Scheduler(
            kv_cache,
            EncoderCache(config.encoder_cache_tokens),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_mixed_tokens=config.max_mixed_tokens,
            encoder_budget=max(config.max_num_batched_tokens, IMAGES_AT_ONCE * feature_size),
        )
        if self.max_model_len < self.runner.max_model_len:
            logger.warning(
                "the cache holds %d tokens: longer requests are refused, though the context is %d; give it more memory",
                self.max_model_len,
                self.runner.max_model_len,
            )
        self._long_rope_start = long_context_start(config.text_config)
        self._depth = config.pipeline_depth
        self._encoder_seconds, self._encoder_images = 0.0, 0
        self._profiler: StepProfiler | None = None
        if config.profile_dir is not None:
            self._profiler = StepProfiler(config.profile_dir, config.profile_steps, config.device)
        self._launched: deque[tuple[SchedulerOutput, PendingStep]] = deque()

    @property
    def max_model_len(self) -> int:
        """The longest sequence that can be served: the model's limit or the cache's size, whichever is less."""
        return min(self.runner.max_model_len, self.scheduler.kv_cache.capacity)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_requests or bool(self._launched)

    def add(self, source: EngineRequest) -> list[EngineOutput]:
        """Queue a request; what cannot be served comes back as an output that says so."""
        try:
            request = Request(source, self._long_rope_start, self.matcher(source))
            request.check_images()
            self.scheduler.add(request)
        except (ValueError, AssertionError) as error:
            return [EngineOutput(source.request_id, [], finish_reason="error", error=str(error) or "bad request")]
        return []

    def matcher(self, source: EngineRequest) -> LLMatcher | None:
        """Compile a request's grammar, if it has one. May be called in any thread.

        Raises:
            ValueError: it cannot be.
        """
        if source.grammar is None:
            return None
        try:
            return self.runner.grammars.matcher(source.grammar)
        except ValueError as error:
            raise ValueError(f"structured_outputs: {error}") from None

    def abort(self, request_ids: list[str]) -> None:
        """Drop requests; unknown names are those that ended by themselves."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)

    def step(self) -> EngineOutputs:
        """Launch the next step, then take in the oldest one if the pipeline is full or nothing could be launched."""
        scheduled = self.scheduler.schedule()
        try:
            if scheduled.requests:
                self._launched.append((scheduled, self.runner.execute(scheduled)))
            outputs = self._take_in(force=not scheduled.requests)
        except Exception as error:
            outputs = self._recover(scheduled, error)
        if self._profiler is not None and scheduled.requests:
            self._profiler.step()
        return EngineOutputs(outputs, self.stats())

    def stats(self) -> SchedulerStats:
        """The state of queues and caches, and the encoder's work so far."""
        stats = self.scheduler.stats()
        stats.encoder_seconds, stats.encoder_images = self._encoder_seconds, self._encoder_images
        return stats

    def close(self) -> None:
        """No step follows."""
        if self._profiler is not None:
            self._profiler.close()

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless scheduler and caches are consistent."""
        self.scheduler.check_integrity()

    def _take_in(self, *, force: bool) -> list[EngineOutput]:
        if not self._launched or (len(self._launched) < self._depth and not force):
            return []
        step, pending = self._launched[0]
        result = pending.result()
        outputs = self.scheduler.update(step, result)
        self._launched.popleft()  # now that nothing can fail any more
        self._encoder_seconds += result.encoder_seconds
        self._encoder_images += len(step.encode_images)
        return outputs

    def _recover(self, scheduled: SchedulerOutput, error: Exception) -> list[EngineOutput]:
        """End the requests of steps that broke, so that the others can go on."""
        logger.exception("a step failed; its requests end with an error")
        outputs: list[EngineOutput] = []
        broken = [] if not scheduled.requests or self._is_launched(scheduled) else [scheduled]
        if broken:
            # What was launched before may be whole, and bring answers their ends.
            with contextlib.suppress(Exception):
                while self._launched:
                    outputs += self._take_in(force=True)
        broken += [step for step, _ in self._launched]
        self._launched.clear()
        self.runner.recover()
        message = "the GPU ran out of memory" if "out of memory" in str(error) else "the engine failed in this step"
        ended = {output.request_id for output in outputs if output.finish_reason is not None}
        failed = self.scheduler.fail(broken, message)
        return outputs + [output for output in failed if output.request_id not in ended]

    def _is_launched(self, scheduled: SchedulerOutput) -> bool:
        return any(step is scheduled for step, _ in self._launched)
