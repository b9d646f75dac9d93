"""Decides what each step computes."""

import time
from bisect import insort
from collections.abc import Callable
from itertools import pairwise

from engine.core.encoder_cache import EncoderCache
from engine.core.kv_cache import KVCache
from engine.core.request import Request
from engine.messages import EngineOutput, ImageInput, SchedulerStats
from engine.step import ModelRunnerOutput, NewRequest, ScheduledRequest, SchedulerOutput

# Waiting requests that may be passed over in one step because their images must wait.
_MOST_SKIPPED = 32
IMAGES_AT_ONCE = 4
"""Encoded in one step where requests wait: four take little more than twice as long as one."""


class Scheduler:
    """One token budget a step: running requests first, then waiting ones, each in the order of priority and arrival.

    A step may be put together before the tokens of the one before it are known: then a request's newest token is in
    flight, and the worker takes it from where it was sampled.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        encoder_cache: EncoderCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_mixed_tokens: int | None = None,
        encoder_budget: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kv_cache = kv_cache
        self.encoder_cache = encoder_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_mixed_tokens = max_mixed_tokens or max_num_batched_tokens
        """Tokens of a step in which requests generate: each of these waits for the whole step."""
        self.encoder_budget = encoder_budget
        """Image tokens that one step may encode; at least those of one image."""
        self.num_preemptions = 0
        self._clock = clock
        self._requests: dict[str, Request] = {}
        # Both sorted by `Request.order`: the last one running is the first to be preempted, and since the step is put
        # together in this order, what is preempted never has a part in it yet.
        self._running: list[Request] = []
        self._waiting: list[Request] = []
        self._ended_ids: list[str] = []

    @property
    def has_requests(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: its name is taken, or it could never be served.
        """
        if request.id in self._requests:
            raise ValueError(f"a request named {request.id!r} is already being served")
        if request.max_total_tokens > self.kv_cache.capacity:
            raise ValueError(
                f"prompt and answer may take {request.max_total_tokens} tokens, "
                f"but the KV cache holds {self.kv_cache.capacity}"
            )
        largest = max((image.num_tokens for image in request.source.images), default=0)
        if largest > min(self.encoder_cache.capacity, self.encoder_budget):
            raise ValueError(f"an image of {largest} tokens does not fit the encoder cache")
        self._requests[request.id] = request
        insort(self._waiting, request, key=_order)

    def abort(self, request_id: str) -> None:
        """Drop a request wherever it is; what is in flight for it will be ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)

    def schedule(self) -> SchedulerOutput:
        """Put the next step together; it may be empty."""
        for request in self._running:
            self.encoder_cache.release(request, computed=request.num_computed_tokens)
        step = SchedulerOutput()
        generating = sum(request.num_output_tokens > 0 for request in self._running)
        budget = _Budget(self._most_tokens(generating), self.encoder_budget, reserved=generating)
        preempted = self._schedule_running(step, budget)
        if not preempted:
            self._schedule_waiting(step, budget)
        if step.encode_images:
            self._encode_ahead(step, budget)
        if step.requests:
            step.finished_ids, self._ended_ids = self._ended_ids, []
            step.freed_images = self.encoder_cache.take_evicted()
        return step

    def update(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineOutput]:
        """Take in what a step brought; returns what is new for each request that still lives."""
        outputs = []
        for part, request in zip(step.requests, step.owners, strict=True):
            assert isinstance(request, Request)
            if self._requests.get(request.id) is not request:
                continue  # it has ended; its name may be another one's by now
            if request.id in result.failed:
                self._end(request)
                error = result.failed[request.id]
                outputs.append(EngineOutput(request.id, [], finish_reason="error", error=error))
                continue
            news = result.prompt_logprobs.get(request.id, [])
            request.prompt_logprobs += news[len(request.prompt_logprobs) - part.start :]
            if part.samples:
                outputs.append(self._take_token(request, result))
        return outputs

    def fail(self, steps: list[SchedulerOutput], message: str) -> list[EngineOutput]:
        """End every request of steps that broke, and forget all that those steps should have computed.

        Requests that have ended are told so once more: it may have been in a step whose outputs are lost.
        """
        failed = {part.request_id for step in steps for part in step.requests}
        for request_id in failed:
            self.abort(request_id)
        outputs = [EngineOutput(request_id, [], finish_reason="error", error=message) for request_id in sorted(failed)]
        self.kv_cache.reset_prefixes()
        self.encoder_cache.clear()
        return outputs

    def stats(self) -> SchedulerStats:
        """The queues' lengths and the caches' state."""
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_cache_usage=self.kv_cache.usage,
            prefix_cache_queries=self.kv_cache.queries,
            prefix_cache_hits=self.kv_cache.hits,
            num_preemptions=self.num_preemptions,
        )

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless queues and caches agree with each other."""
        assert {r.id for r in self._running} | {r.id for r in self._waiting} == self._requests.keys()
        assert len(self._running) + len(self._waiting) == len(self._requests)
        assert len(self._running) <= self.max_num_seqs
        assert all(a.order < b.order for queue in (self._running, self._waiting) for a, b in pairwise(queue))
        assert not any(r.block_ids or r.held_images or r.num_computed_tokens for r in self._waiting)
        for request in self._running:
            held = len(request.block_ids) * self.kv_cache.block_size
            assert request.num_computed_tokens <= min(request.num_tokens, held)
            assert 0 <= request.num_in_flight <= request.num_output_tokens <= request.source.max_tokens
        self.kv_cache.check_integrity(self._running)
        self.encoder_cache.check_integrity(self._running)

    def _most_tokens(self, generating: int) -> int:
        """Of the next step: however many requests generate, half of what is allowed beside them is for prompts."""
        if not generating:
            return self.max_num_batched_tokens
        return min(self.max_num_batched_tokens, max(self.max_mixed_tokens, generating + self.max_mixed_tokens // 2))

    def _schedule_running(self, step: SchedulerOutput, budget: "_Budget") -> bool:
        """Returns whether a request had to be preempted."""
        preempted = False
        index = 0
        while index < len(self._running) and budget.tokens > 0:
            request = self._running[index]
            index += 1
            budget.reserved -= request.num_output_tokens > 0
            count = self._count(request, budget)
            if count == 0:
                continue
            blocks = self.kv_cache.extend(request, request.num_computed_tokens + count)
            while blocks is None:
                preempted = True
                victim = self._running[-1]
                self._preempt(victim)
                if victim is request:
                    break
                blocks = self.kv_cache.extend(request, request.num_computed_tokens + count)
            if blocks is not None:
                self._launch(request, count, blocks, step, budget)
        return preempted

    def _schedule_waiting(self, step: SchedulerOutput, budget: "_Budget") -> None:
        skipped = 0
        for request in list(self._waiting):
            if budget.tokens == 0 or len(self._running) == self.max_num_seqs or skipped == _MOST_SKIPPED:
                return
            if request.num_in_flight:
                continue  # preempted a moment ago: its newest token is not known yet
            prefix = self.kv_cache.find_prefix(request)
            request.num_computed_tokens = len(prefix) * self.kv_cache.block_size
            count = self._count(request, budget)
            # A request whose image must wait for the encoder's next turn does not hold up those behind it; one
            # that waits for memory does, lest small requests starve a large one.
            if count == 0:
                request.num_computed_tokens = 0
                skipped += 1
                continue
            if not self.kv_cache.start(request, prefix, request.num_computed_tokens + count):
                request.num_computed_tokens = 0
                return
            self._start(request, step)
            self._launch(request, count, [], step, budget)

    def _start(self, request: Request, step: SchedulerOutput) -> None:
        self._waiting.remove(request)
        insort(self._running, request, key=_order)
        if not request.scheduled_time:
            request.scheduled_time = self._clock()
            request.num_cached_tokens = request.num_computed_tokens
            if self.kv_cache.looks_up(request):
                self.kv_cache.queries += len(request.token_ids)
                self.kv_cache.hits += request.num_computed_tokens
        step.new_requests.append(
            NewRequest(request.source, list(request.token_ids), list(request.block_ids), request.matcher)
        )

    def _count(self, request: Request, budget: "_Budget") -> int:
        """How many tokens of a request this step may compute, as budgets and its images allow."""
        if request.num_output_tokens >= request.source.max_tokens:
            return 0  # its last token is in flight
        start = request.num_computed_tokens
        end = min(request.num_tokens, start + max(0, budget.tokens - budget.reserved))
        encoder_tokens = budget.encoder_tokens
        images: list[ImageInput] = []
        for image in request.images_in(start, end):
            if not self.encoder_cache.has(image) and all(image.hash != other.hash for other in images):
                encoder_tokens -= image.num_tokens
            images.append(image)
            if encoder_tokens < 0 or not self.encoder_cache.fits(images):
                return max(0, image.offset - start)
        return end - start

    def _launch(
        self, request: Request, count: int, blocks: list[int], step: SchedulerOutput, budget: "_Budget"
    ) -> None:
        start = request.num_computed_tokens
        images = request.images_in(start, start + count)
        # What is there is held first, so that what comes new cannot drive it out.
        for image in sorted(images, key=lambda image: not self.encoder_cache.has(image)):
            self._encode(request, image, step, budget)
        budget.tokens -= count
        samples = start + count == request.num_tokens
        step.requests.append(
            ScheduledRequest(request.id, start, count, samples, blocks, num_output_tokens=request.num_output_tokens)
        )
        step.owners.append(request)
        request.num_computed_tokens += count
        request.num_in_flight += samples
        self.kv_cache.register(request)

    def _encode(self, request: Request, image: ImageInput, step: SchedulerOutput, budget: "_Budget") -> None:
        if not self.encoder_cache.has(image):
            self.encoder_cache.put(image)
            budget.encoder_tokens -= image.num_tokens
            step.encode_images.append(image)
        self.encoder_cache.hold(request, image)

    def _encode_ahead(self, step: SchedulerOutput, budget: "_Budget") -> None:
        """Have images of waiting requests encoded along with those that this step needs, where there is room."""
        kept = {image.hash: image for image in step.encode_images}
        for request in self._waiting[:IMAGES_AT_ONCE]:
            cached = len(self.kv_cache.find_prefix(request)) * self.kv_cache.block_size
            for image in request.source.images:
                if image.end <= cached:
                    continue
                is_new = not self.encoder_cache.has(image)
                budget.encoder_tokens -= is_new * image.num_tokens
                kept[image.hash] = image
                if budget.encoder_tokens < 0 or not self._may_keep(list(kept.values())):
                    return
                if is_new:
                    self.encoder_cache.put(image)
                    step.encode_images.append(image)
                self.encoder_cache.spare(image)

    def _may_keep(self, images: list[ImageInput]) -> bool:
        """Whether so many images may be encoded together. Half of the cache is left alone, lest what is encoded for
        one step drive out what another one will need.
        """
        crowded = 2 * sum(image.num_tokens for image in images) > self.encoder_cache.capacity
        return len(images) <= IMAGES_AT_ONCE and not crowded and self.encoder_cache.fits(images)

    def _take_token(self, request: Request, result: ModelRunnerOutput) -> EngineOutput:
        token = result.sampled[request.id]
        request.num_in_flight -= 1
        first = len(request.token_ids) == request.num_prompt_tokens
        request.token_ids.append(token)
        if request.block_ids:
            self.kv_cache.register(request)
        output = EngineOutput(request.id, [token])
        if request.id in result.logprobs:
            output.logprobs = [result.logprobs[request.id]]
        if first:
            output.num_cached_tokens = request.num_cached_tokens
            output.scheduled_time = request.scheduled_time
            if request.source.params.prompt_logprobs is not None:
                output.prompt_logprobs = request.prompt_logprobs[: request.num_prompt_tokens - 1]
        output.finish_reason, output.stop_reason = _finish(request, token)
        if output.finish_reason is not None:
            self._end(request)
        return output

    def _preempt(self, request: Request) -> None:
        """Take a running request's memory; it starts again from its beginning, later."""
        self.num_preemptions += 1
        self._running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        insort(self._waiting, request, key=_order)

    def _end(self, request: Request) -> None:
        del self._requests[request.id]
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            self._running.remove(request)
            self._release(request)

    def _release(self, request: Request) -> None:
        self.kv_cache.free(request)
        self.encoder_cache.release(request)
        self._ended_ids.append(request.id)


class _Budget:
    """What a step may still take on."""

    __slots__ = ("encoder_tokens", "reserved", "tokens")

    def __init__(self, tokens: int, encoder_tokens: int, reserved: int) -> None:
        self.tokens = tokens
        self.encoder_tokens = encoder_tokens
        self.reserved = reserved
        """Tokens for the requests that generate and have not been looked at yet: no prompt takes these."""


def _order(request: Request) -> tuple[float, str]:
    return request.order


def _finish(request: Request, token: int) -> tuple[str | None, int | None]:
    """The finish reason and stop reason that a new token brings."""
    source, params = request.source, request.source.params
    outputs = len(request.token_ids) - request.num_prompt_tokens
    if outputs >= params.min_tokens:
        if not params.ignore_eos and token in source.eos_token_ids:
            return "stop", None
        if token in params.stop_token_ids:
            return "stop", token
    if outputs >= source.max_tokens:
        return "length", None
    return None, None
