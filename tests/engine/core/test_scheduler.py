import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core.encoder_cache import EncoderCache
from engine.core.kv_cache import KVCache
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.messages import EngineOutput, EngineRequest, ImageInput, PositionLogprobs
from engine.sampling_params import SamplingParams
from engine.step import ModelRunnerOutput, ScheduledRequest, SchedulerOutput

IMAGE_TOKEN = 9
EOS = 0
IMAGE_SIZES = {b"a": 2, b"b": 3, b"c": 4, b"d": 3}


class Context:
    """What a cache slot must hold: a digest of salt, tokens and images from the sequence's beginning on."""

    def __init__(self, source: EngineRequest) -> None:
        self._images = source.images
        self._digests = [source.cache_salt.encode()]

    def at(self, tokens: list[int], position: int) -> bytes:
        while len(self._digests) <= position + 1:
            index = len(self._digests) - 1
            digest = hashlib.sha256(self._digests[-1] + b"/%d" % tokens[index])
            for image in self._images:
                if image.offset <= index < image.end:
                    digest.update(image.hash + b"@%d" % (index - image.offset))
            self._digests.append(digest.digest())
        return self._digests[position + 1]

    def next_token(self, tokens: list[int], position: int) -> int:
        return self.at(tokens, position)[0] % 8


@dataclass
class Row:
    source: EngineRequest
    tokens: list[int]
    blocks: list[int]
    context: Context


@dataclass
class Written:
    """What a step changed, to be lost when it fails."""

    slots: list[tuple[int, int]] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)


class FakeWorker:
    """Knows only what the scheduler's steps tell it, and checks that this is enough."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._limits = scheduler
        self._block_size = scheduler.kv_cache.block_size
        self.slots: dict[tuple[int, int], bytes] = {}
        self.images: dict[bytes, int] = {}
        self.rows: dict[str, Row] = {}

    def execute(self, step: SchedulerOutput, *, broken: bool = False) -> tuple[ModelRunnerOutput, Written]:
        written = Written()
        self._change_requests(step)
        for digest in step.freed_images:
            self.images.pop(digest, None)
        if broken:
            return ModelRunnerOutput(), written
        self._encode(step, written)
        assert 0 < step.num_tokens <= self._limits.max_num_batched_tokens
        assert len({part.request_id for part in step.requests}) == len(step.requests)
        for part in step.requests:
            self.rows[part.request_id].blocks += part.new_block_ids
        # As in the model: in each layer all of the step's tokens are written before any are read.
        for part in step.requests:
            self._write(part, written)
        assert len(set(written.slots)) == len(written.slots), "two requests write the same slot"
        result = ModelRunnerOutput()
        for part in step.requests:
            self._compute(part, result)
        return result, written

    def lose(self, written: Written) -> None:
        for slot in written.slots:
            self.slots[slot] = b"lost"
        for digest in written.images:
            self.images.pop(digest, None)

    def _change_requests(self, step: SchedulerOutput) -> None:
        for name in step.finished_ids:
            self.rows.pop(name, None)
        for new in step.new_requests:
            name = new.request.request_id
            assert name not in self.rows
            row = Row(new.request, list(new.token_ids), list(new.block_ids), Context(new.request))
            self.rows[name] = row
        assert len(self.rows) <= self._limits.max_num_seqs

    def _encode(self, step: SchedulerOutput, written: Written) -> None:
        assert sum(image.num_tokens for image in step.encode_images) <= self._limits.encoder_budget
        for image in step.encode_images:
            assert image.hash not in self.images, "an image is encoded twice"
            self.images[image.hash] = image.num_tokens
            written.images.append(image.hash)
        assert sum(self.images.values()) <= self._limits.encoder_cache.capacity

    def _slot(self, row: Row, position: int) -> tuple[int, int]:
        return row.blocks[position // self._block_size], position % self._block_size

    def _write(self, part: ScheduledRequest, written: Written) -> None:
        row = self.rows[part.request_id]
        end = part.start + part.num_tokens
        assert part.num_tokens > 0
        assert end <= len(row.tokens), "a token is to be computed before it was sampled"
        assert part.samples == (end == len(row.tokens))
        assert part.num_output_tokens == len(row.tokens) - len(row.source.prompt_token_ids)
        for position in range(part.start, end):
            slot = self._slot(row, position)
            self.slots[slot] = row.context.at(row.tokens, position)
            written.slots.append(slot)

    def _compute(self, part: ScheduledRequest, result: ModelRunnerOutput) -> None:
        row = self.rows[part.request_id]
        end = part.start + part.num_tokens
        for position in range(end):
            found = self.slots.get(self._slot(row, position))
            assert found == row.context.at(row.tokens, position), f"position {position} holds something else"
        for image in row.source.images:
            assert image.offset >= end or image.end <= part.start or image.hash in self.images
        if row.source.params.prompt_logprobs is not None:
            prompt = row.source.prompt_token_ids
            known = range(part.start, min(end, len(prompt) - 1))
            result.prompt_logprobs[part.request_id] = [PositionLogprobs([prompt[i + 1]], [-float(i)], 1) for i in known]
        if part.samples:
            token = row.context.next_token(row.tokens, end - 1)
            row.tokens.append(token)
            result.sampled[part.request_id] = token
            if row.source.params.logprobs is not None:
                result.logprobs[part.request_id] = PositionLogprobs([token], [-float(end)], 1)


def run_alone(source: EngineRequest) -> tuple[list[int], str, int | None]:
    """Output, finish reason and stop reason of a request that has the model for itself."""
    context, tokens, params = Context(source), list(source.prompt_token_ids), source.params
    output: list[int] = []
    while True:
        token = context.next_token(tokens, len(tokens) - 1)
        tokens.append(token)
        output.append(token)
        if len(output) >= params.min_tokens:
            if token in source.eos_token_ids and not params.ignore_eos:
                return output, "stop", None
            if token in params.stop_token_ids:
                return output, "stop", token
        if len(output) == source.max_tokens:
            return output, "length", None


class Engine:
    """Scheduler and fake worker with steps on the way between them; checks every answer that ends."""

    def __init__(
        self,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        prefix_caching: bool = True,
        encoder_capacity: int = 8,
        encoder_budget: int = 8,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_mixed_tokens: int | None = None,
    ) -> None:
        self.scheduler = Scheduler(
            KVCache(num_blocks, block_size, enable_prefix_caching=prefix_caching),
            EncoderCache(encoder_capacity),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_mixed_tokens=max_mixed_tokens,
            encoder_budget=encoder_budget,
        )
        self.worker = FakeWorker(self.scheduler)
        self.launched: deque[tuple[SchedulerOutput, ModelRunnerOutput, Written]] = deque()
        self.sources: dict[str, EngineRequest] = {}
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, EngineOutput] = {}
        self.first: dict[str, EngineOutput] = {}
        self.num_evicted = 0

    def add(self, source: EngineRequest) -> None:
        request = Request(source)
        request.check_images()
        self.scheduler.add(request)
        self.sources[source.request_id] = source
        self.outputs[source.request_id] = []

    def abort(self, name: str) -> None:
        self.scheduler.abort(name)
        del self.sources[name]

    def launch(self) -> SchedulerOutput:
        preemptions = self.scheduler.num_preemptions
        step = self.scheduler.schedule()
        assert preemptions == self.scheduler.num_preemptions or not step.new_requests
        if step.requests:
            self.num_evicted += len(step.freed_images)
            self.launched.append((step, *self.worker.execute(step)))
        else:
            assert not step.new_requests
            assert not step.encode_images
        return step

    def take_in(self) -> None:
        step, result, _ = self.launched.popleft()
        for output in self.scheduler.update(step, result):
            self._take(output)

    def _take(self, output: EngineOutput) -> None:
        name = output.request_id
        source, outputs = self.sources[name], self.outputs[name]
        prompt = len(source.prompt_token_ids)
        outputs += output.new_token_ids
        if len(outputs) == 1:
            self.first[name] = output
            assert output.num_cached_tokens < prompt
            assert output.scheduled_time > 0
            if source.params.prompt_logprobs is None:
                assert output.prompt_logprobs is None
            else:
                assert output.prompt_logprobs is not None
                assert [p.logprobs[0] for p in output.prompt_logprobs] == [-float(i) for i in range(prompt - 1)]
        if source.params.logprobs is not None:
            assert output.logprobs == [PositionLogprobs(output.new_token_ids, [-float(prompt + len(outputs) - 1)], 1)]
        if output.finish_reason is not None:
            assert (outputs, output.finish_reason, output.stop_reason) == run_alone(source)
            self.finished[name] = output
            del self.sources[name]

    def fail(self, *, in_execute: bool) -> None:
        """The worker breaks, while it launches another step or later."""
        if in_execute:
            step = self.scheduler.schedule()
            if not step.requests:
                return
            self.launched.append((step, *self.worker.execute(step, broken=True)))
        names = {part.request_id for step, _, _ in self.launched for part in step.requests}
        for _, _, written in self.launched:
            self.worker.lose(written)
        outputs = self.scheduler.fail([step for step, _, _ in self.launched], "broken")
        self.launched.clear()
        assert {output.request_id for output in outputs} == names
        assert all(output.finish_reason == "error" and output.error == "broken" for output in outputs)
        for output in outputs:
            self.sources.pop(output.request_id, None)

    def run(self, depth: int = 1) -> None:
        """Work as the engine core does until nothing is left; ends with an error when something starves."""
        tokens = sum(len(s.prompt_token_ids) + s.max_tokens for s in self.sources.values())
        for _ in range(20 + 20 * tokens):
            if not self.scheduler.has_requests and not self.launched:
                break
            preempted = self.scheduler.num_preemptions
            step = self.launch()
            # What is preempted may hold an image that the others wait for until then: they go on in the next step.
            idle = not step.requests and not self.launched and preempted == self.scheduler.num_preemptions
            assert not idle, "nothing runs and nothing can start"
            if self.launched and (len(self.launched) >= depth or not step.requests):
                self.take_in()
            self.scheduler.check_integrity()
        assert not self.sources, "a request starved"
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0)


def prompt_of(parts: Iterable[list[int] | bytes]) -> tuple[list[int], list[ImageInput]]:
    tokens: list[int] = []
    images: list[ImageInput] = []
    for part in parts:
        if isinstance(part, bytes):
            size = IMAGE_SIZES[part]
            images.append(ImageInput(part, len(tokens), size, b"", (), "pixels"))
            tokens += [IMAGE_TOKEN] * size
        else:
            tokens += part
    return tokens, images


def make(
    name: str,
    *parts: list[int] | bytes,
    max_tokens: int = 4,
    priority: int = 0,
    salt: str = "",
    **params: Any,
) -> EngineRequest:
    """A request whose arrival is its number's: `r3` comes before `r4`. It has no end but its length."""
    tokens, images = prompt_of(parts)
    return EngineRequest(
        name,
        tokens,
        SamplingParams(**params),
        max_tokens,
        seed=0,
        images=images,
        priority=priority,
        arrival_time=float(name[1:]),
        cache_salt=salt,
    )


class SchedulerMachine(RuleBasedStateMachine):
    engine: Engine
    depth: int
    number = 0

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(5, 14),
        prefix_caching=st.sampled_from([True, True, True, False]),
        encoder_capacity=st.integers(3, 9),
        encoder_budget=st.integers(3, 9),
        max_num_seqs=st.integers(1, 4),
        max_num_batched_tokens=st.integers(1, 12),
        max_mixed_tokens=st.sampled_from([None, 1, 3, 6]),
        depth=st.sampled_from([1, 2, 2, 3]),
    )
    def start(self, depth: int, **sizes: Any) -> None:
        self.engine = Engine(**sizes)
        self.depth = depth

    @rule(
        parts=st.lists(
            st.sampled_from([[1], [1, 2], [1, 2, 1, 2], [2, 2, 1], b"a", b"b", b"c", b"d"]),
            min_size=1,
            max_size=5,
        ),
        max_tokens=st.integers(1, 8),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        salt=st.sampled_from(["", "", "", "salt"]),
        stop_token_ids=st.lists(st.sampled_from([EOS, 5, 6]), max_size=2),
        min_tokens=st.sampled_from([0, 0, 2]),
        ignore_eos=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        logprobs=st.sampled_from([None, 0]),
    )
    def add(
        self,
        parts: list[list[int] | bytes],
        max_tokens: int,
        priority: int,
        salt: str,
        min_tokens: int,
        **params: Any,
    ) -> None:
        self.number += 1
        kept = [part for i, part in enumerate(parts) if sum(isinstance(p, bytes) for p in parts[: i + 1]) <= 3]
        min_tokens = min(min_tokens, max_tokens)
        source = make(f"r{self.number}", *kept, max_tokens=max_tokens, priority=priority, salt=salt, **params)
        source.params.min_tokens = min_tokens
        source.eos_token_ids = [EOS]
        scheduler = self.engine.scheduler
        most = min(scheduler.encoder_cache.capacity, scheduler.encoder_budget)
        too_long = len(source.prompt_token_ids) + max_tokens > scheduler.kv_cache.capacity
        if too_long or any(image.num_tokens > most for image in source.images):
            with pytest.raises(ValueError, match="KV cache|encoder cache"):
                self.engine.add(source)
        else:
            self.engine.add(source)

    @precondition(lambda self: self.engine.sources)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.sources))))

    @precondition(lambda self: len(self.engine.launched) < self.depth)
    @rule()
    def launch(self) -> None:
        self.engine.launch()

    @precondition(lambda self: self.engine.sources)
    @rule(count=st.integers(1, 12))
    def go_on(self, count: int) -> None:
        for _ in range(count):
            step = self.engine.launch()
            if self.engine.launched and (len(self.engine.launched) >= self.depth or not step.requests):
                self.engine.take_in()
            self.engine.scheduler.check_integrity()

    @precondition(lambda self: self.engine.launched)
    @rule()
    def take_in(self) -> None:
        self.engine.take_in()

    @precondition(lambda self: self.engine.launched and len(self.engine.launched) < self.depth)
    @rule(in_execute=st.booleans())
    def fail(self, in_execute: bool) -> None:
        self.engine.fail(in_execute=in_execute)

    @invariant()
    def is_consistent(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run(self.depth)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(derandomize=True, deadline=None, max_examples=500, stateful_step_count=25)


@pytest.mark.parametrize("depth", [1, 2])
def test_preemption(depth: int) -> None:
    engine = Engine(num_blocks=6, block_size=2, max_num_seqs=3)
    for number in range(3):
        engine.add(make(f"r{number}", [1, 2, number], max_tokens=8))
    engine.run(depth)
    assert engine.scheduler.stats().num_preemptions > 0
    assert len(engine.finished) == 3


def test_last_in_order_is_preempted_first() -> None:
    engine = Engine(num_blocks=4, block_size=2)
    engine.add(make("r0", [1, 2, 1], max_tokens=5, priority=1))
    engine.add(make("r1", [2, 2, 1], max_tokens=5))
    assert [part.request_id for part in engine.launch().requests] == ["r1", "r0"]
    while not engine.scheduler.num_preemptions:
        engine.take_in()
        step = engine.launch()
    assert [part.request_id for part in step.requests] == ["r1"]
    assert step.finished_ids == ["r0"]
    engine.run()
    assert list(engine.finished) == ["r1", "r0"]


@pytest.mark.parametrize("depth", [1, 2])
def test_token_in_flight_of_a_preempted_request_is_kept(depth: int) -> None:
    engine = Engine(num_blocks=4, block_size=2, prefix_caching=False)
    engine.add(make("r0", [1, 2, 1], max_tokens=5))
    engine.add(make("r1", [2, 2, 1], max_tokens=5))
    engine.launch()  # both sample
    if depth == 1:
        engine.take_in()
    engine.launch()  # both need no more blocks
    if depth == 1:
        engine.take_in()
    assert engine.launch().requests[0].request_id == "r0"  # r1 loses its blocks
    assert engine.scheduler.num_preemptions == 1
    known = len(engine.outputs["r1"])
    while engine.launched:
        engine.take_in()
    assert len(engine.outputs["r1"]) == 2 >= known
    assert len(run_alone(engine.sources["r1"])[0]) == 5
    engine.run(depth)
    assert len(engine.outputs["r1"]) == 5


def test_preempted_request_waits_for_its_token_in_flight() -> None:
    engine = Engine(num_blocks=4, block_size=2, max_num_seqs=3)
    engine.add(make("r0", [1, 2, 1], max_tokens=2))
    engine.add(make("r1", [2, 2, 1], max_tokens=5))
    engine.launch()
    engine.launch()
    step = engine.launch()  # r0's last token is in flight; r1 has no block, and is its own victim
    assert step.requests == []
    assert engine.scheduler.num_preemptions == 1
    engine.abort("r0")
    assert engine.launch().requests == []  # there is room, but r1's tokens are not known
    engine.take_in()
    assert engine.launch().requests == []
    engine.take_in()
    assert engine.launch().requests[0].request_id == "r1"
    engine.run()


@pytest.mark.parametrize("depth", [1, 2])
def test_prompt_logprobs_survive_preemption_in_the_prompt(depth: int) -> None:
    engine = Engine(num_blocks=8, block_size=2, max_num_batched_tokens=3)
    engine.add(make("r0", [1], max_tokens=12))
    engine.add(make("r1", [2, 1] * 6, max_tokens=2, prompt_logprobs=0))
    engine.run(depth)
    assert engine.scheduler.num_preemptions > 0


def test_prefix_hit() -> None:
    engine = Engine(block_size=4)
    engine.add(make("r0", [1, 2, 3, 4, 5, 6, 7]))
    engine.run()
    engine.add(make("r1", [1, 2, 3, 4, 6]))
    engine.run()
    assert engine.first["r0"].num_cached_tokens == 0
    assert engine.first["r1"].num_cached_tokens == 4
    stats = engine.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (12, 4)


def test_prefix_hit_within_one_step() -> None:
    engine = Engine(block_size=4)
    engine.add(make("r0", [1, 2, 3, 4, 5]))
    engine.add(make("r1", [1, 2, 3, 4, 6]))
    assert [(part.start, part.num_tokens) for part in engine.launch().requests] == [(0, 5), (4, 1)]
    engine.run()


def test_prefix_hit_reaches_into_the_answer() -> None:
    engine = Engine(block_size=2)
    source = make("r0", [1, 2, 3], max_tokens=6)
    engine.add(source)
    engine.run()
    engine.add(make("r1", [1, 2, 3, *run_alone(source)[0][:4]]))
    engine.run()
    assert engine.first["r1"].num_cached_tokens == 6


@pytest.mark.parametrize(("length", "cached"), [(7, 4), (8, 4), (9, 8)])
def test_last_token_is_never_a_prefix_hit(length: int, cached: int) -> None:
    engine = Engine(block_size=4)
    for name in ("r0", "r1"):
        engine.add(make(name, [1, 2, 3, 4, 5, 6, 7, 8, 9][:length]))
        engine.run()
    assert engine.first["r1"].num_cached_tokens == cached


def test_salts_do_not_share() -> None:
    engine = Engine(block_size=2)
    for number, salt in enumerate(["", "x", "y", "x"]):
        engine.add(make(f"r{number}", [1, 2, 3, 4, 5], salt=salt))
        engine.run()
    assert [engine.first[f"r{i}"].num_cached_tokens for i in range(4)] == [0, 0, 0, 4]


def test_images_do_not_share_unless_equal() -> None:
    engine = Engine(block_size=2)
    for number, image in enumerate([b"b", b"d", b"b"]):
        engine.add(make(f"r{number}", [1, 2, 3], image, [4]))
        engine.run()
    # The placeholder tokens are the same ones; the block of tokens 2 and 3 holds text and image.
    assert [engine.first[f"r{i}"].num_cached_tokens for i in range(3)] == [0, 2, 6]


def test_no_prefix_hits_when_disabled_or_logprobs_wanted() -> None:
    engine = Engine(block_size=2, prefix_caching=False)
    for name in ("r0", "r1"):
        engine.add(make(name, [1, 2, 3, 4, 5]))
        engine.run()
    assert engine.first["r1"].num_cached_tokens == 0
    assert engine.scheduler.stats().prefix_cache_queries == 0
    engine = Engine(block_size=2)
    for name in ("r0", "r1"):
        engine.add(make(name, [1, 2, 3, 4, 5], prompt_logprobs=0))
        engine.run()
    assert engine.first["r1"].num_cached_tokens == 0


def test_encoder_eviction_is_oldest_first() -> None:
    engine = Engine(encoder_capacity=8, num_blocks=32)
    for number, image in enumerate([b"a", b"b", b"d"]):  # 2 + 3 + 3 tokens
        engine.add(make(f"r{number}", [1], image, salt=str(number)))
        engine.run()
    assert engine.num_evicted == 0
    engine.add(make("r4", [1], b"a", salt="4"))  # now the newest
    engine.run()
    assert set(engine.worker.images) == {b"a", b"b", b"d"}
    engine.add(make("r5", [1], b"c", salt="5"))  # 4 tokens: both images of 3 must go
    engine.run()
    assert set(engine.worker.images) == {b"a", b"c"}
    assert engine.num_evicted == 2


def test_one_image_in_two_requests_is_encoded_once() -> None:
    engine = Engine()
    engine.add(make("r0", [1], b"c", [1], b"c"))
    engine.add(make("r1", [2], b"c"))
    assert [image.hash for image in engine.launch().encode_images] == [b"c"]
    engine.run()


def test_priority_order() -> None:
    engine = Engine(max_num_seqs=1)
    for number, priority in enumerate([1, 0, -1, 0]):
        engine.add(make(f"r{number}", [1, number], priority=priority))
    engine.run()
    assert list(engine.finished) == ["r2", "r1", "r3", "r0"]


def test_nobody_is_starved_by_those_of_higher_priority() -> None:
    """However important a request calls itself, it does not overtake what came half a minute earlier."""
    engine = Engine(max_num_seqs=1)
    engine.add(make("r0", [1, 2]))
    for number in (20, 40):
        engine.add(make(f"r{number}", [1, number], priority=-(2**31)))
    engine.add(make("r100", [1, 3]))
    engine.add(make("r120", [1, 4], priority=2**31 - 1))
    engine.add(make("r160", [1, 5]))
    engine.run()
    assert list(engine.finished) == ["r20", "r0", "r40", "r100", "r120", "r160"]


def test_running_requests_come_before_waiting_ones() -> None:
    engine = Engine(max_num_batched_tokens=4)
    engine.add(make("r1", [1, 2]))
    engine.launch()
    engine.take_in()
    engine.add(make("r0", [2] * 6, priority=-1))
    assert [(part.request_id, part.num_tokens) for part in engine.launch().requests] == [("r1", 1), ("r0", 3)]
    engine.run()


def test_impossible_requests_are_refused() -> None:
    engine = Engine(num_blocks=2, block_size=4, encoder_capacity=3, encoder_budget=8)
    engine.add(make("r0", [1, 2, 3, 4], max_tokens=4))
    with pytest.raises(ValueError, match="may take 9 tokens, but the KV cache holds 8"):
        engine.add(make("r1", [1, 2, 3, 4], max_tokens=5))
    with pytest.raises(ValueError, match="an image of 4 tokens does not fit the encoder cache"):
        engine.add(make("r2", b"c"))
    with pytest.raises(ValueError, match="'r0' is already being served"):
        engine.add(make("r0", [1]))
    engine.run()
    assert list(engine.finished) == ["r0"]


def test_text_is_not_held_up_behind_images() -> None:
    engine = Engine(num_blocks=64, encoder_capacity=8, encoder_budget=4, max_num_seqs=8)
    for number, image in enumerate([b"c", b"b", b"d"]):
        engine.add(make(f"r{number}", image, [1]))
    engine.add(make("r3", [1, 2]))
    step = engine.launch()
    assert [part.request_id for part in step.requests] == ["r0", "r3"]
    assert [image.hash for image in step.encode_images] == [b"c"]
    assert engine.launch().requests[0].request_id == "r0"
    engine.run(depth=2)


def test_image_that_must_wait_splits_the_prompt() -> None:
    engine = Engine(encoder_budget=4)
    engine.add(make("r0", [1, 2], b"b", [3], b"d", [4]))
    parts = [engine.launch().requests[0] for _ in range(2)]
    assert [(part.start, part.num_tokens, part.samples) for part in parts] == [(0, 6, False), (6, 4, True)]
    engine.run(depth=2)


def test_image_that_comes_again_is_not_kept_for_that() -> None:
    engine = Engine(encoder_capacity=4)
    engine.add(make("r0", b"b", b"a", b"b"))  # 3, 2 and 3 tokens
    engine.run(depth=2)
    engine = Engine(num_blocks=32, encoder_capacity=6, max_num_batched_tokens=6)
    engine.add(make("r0", b"b", b"c", b"b"))
    engine.add(make("r1", b"d", b"c", b"d"))
    engine.run(depth=2)


def test_request_that_waits_for_memory_holds_up_those_behind_it() -> None:
    engine = Engine(num_blocks=4, block_size=4, prefix_caching=False)
    engine.add(make("r0", [1] * 8, max_tokens=2))
    engine.launch()
    engine.add(make("r1", [2] * 12, max_tokens=2))
    engine.add(make("r2", [3], max_tokens=2))
    assert [part.request_id for part in engine.launch().requests] == ["r0"]
    engine.take_in()
    engine.take_in()
    assert list(engine.finished) == ["r0"]
    assert [part.request_id for part in engine.launch().requests] == ["r1", "r2"]
    engine.run(depth=2)


def test_blocks_are_reused_oldest_first() -> None:
    engine = Engine(num_blocks=6, block_size=2)
    engine.add(make("r0", [1, 2, 3, 4], max_tokens=1))
    first = engine.launch().new_requests[0].block_ids
    engine.take_in()
    engine.add(make("r1", [5, 6, 7, 8], max_tokens=1))
    second = engine.launch().new_requests[0].block_ids
    engine.take_in()
    assert (first, second) == ([0, 1], [2, 3])
    engine.add(make("r2", [5, 4] * 3, max_tokens=1))
    # Never used, then the one freed longest ago: a request's last block goes before its first.
    assert engine.launch().new_requests[0].block_ids == [4, 5, 1]
    engine.take_in()
    engine.add(make("r3", [1, 2, 3], max_tokens=1))
    engine.run()
    assert engine.first["r3"].num_cached_tokens == 2


def test_abort_in_every_state() -> None:
    engine = Engine(max_num_seqs=1)
    for number in range(3):
        engine.add(make(f"r{number}", [1, 2, number]))
    engine.abort("r2")  # waits
    engine.launch()
    engine.abort("r0")  # in flight
    engine.scheduler.abort("r0")  # nobody knows it any more
    step = engine.launch()
    assert step.finished_ids == ["r0"]
    assert [new.request.request_id for new in step.new_requests] == ["r1"]
    engine.run(depth=2)
    assert list(engine.finished) == ["r1"]


def test_a_name_that_is_used_again_while_its_step_is_on_its_way() -> None:
    """The newer request does not get the older one's token."""
    engine = Engine()
    engine.add(make("r0", [1, 2, 3]))
    engine.launch()
    engine.abort("r0")
    engine.add(make("r0", [4, 5], max_tokens=2))
    engine.launch()
    engine.take_in()
    assert engine.outputs["r0"] == []
    engine.run(depth=2)
    assert list(engine.finished) == ["r0"]


def test_failure_ends_the_steps_requests_only() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add(make("r0", [1, 2, 3, 4, 5], b"a"))
    engine.add(make("r1", [1, 2, 3, 4, 5], b"a"))
    engine.launch()
    engine.fail(in_execute=False)
    assert list(engine.sources) == ["r1"]
    engine.run()
    assert engine.first["r1"].num_cached_tokens == 0  # the failed step's blocks are not trusted


def test_no_more_passed_over_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.core.scheduler._MOST_SKIPPED", 2)
    engine = Engine(num_blocks=64, encoder_budget=4, max_num_seqs=8, max_num_batched_tokens=64)
    for number, image in enumerate([b"c", b"b", b"d"]):
        engine.add(make(f"r{number}", image))
    engine.add(make("r3", [1]))
    assert [part.request_id for part in engine.launch().requests] == ["r0"]
    engine.run()


Check = Callable[[Engine], None]


def spoil_queue(engine: Engine) -> None:
    engine.scheduler._waiting.clear()


def spoil_blocks(engine: Engine) -> None:
    engine.scheduler._running[0].block_ids.pop()


def spoil_images(engine: Engine) -> None:
    engine.scheduler._running[0].held_images.clear()


@pytest.mark.parametrize("spoil", [spoil_queue, spoil_blocks, spoil_images])
def test_integrity_check_sees_damage(spoil: Check) -> None:
    engine = Engine(max_num_seqs=1)
    engine.add(make("r0", [1, 2, 3], b"a"))
    engine.add(make("r1", [1]))
    engine.launch()
    engine.scheduler.check_integrity()
    spoil(engine)
    with pytest.raises((AssertionError, KeyError)):
        engine.scheduler.check_integrity()


def test_prompts_leave_room_for_those_that_generate() -> None:
    """Alone, prompts fill a step; beside requests that generate, they get what is left of the smaller one."""
    engine = Engine(num_blocks=64, max_num_batched_tokens=16, max_mixed_tokens=6)
    engine.add(make("r1", [1] * 10))
    assert engine.launch().num_tokens == 10
    engine.take_in()
    engine.add(make("r2", [2] * 20))
    assert [part.num_tokens for part in engine.launch().requests] == [1, 5]
    engine.run()


def test_many_that_generate_leave_prompts_half_of_what_is_mixed() -> None:
    engine = Engine(num_blocks=64, max_num_seqs=9, max_num_batched_tokens=16, max_mixed_tokens=6)
    for number in range(8):
        engine.add(make(f"r{number}", [number, 1]))
    engine.launch()
    engine.take_in()
    engine.add(make("r8", [2] * 20))
    assert [part.num_tokens for part in engine.launch().requests] == [1] * 8 + [3]
    engine.run()


def test_a_prompt_takes_no_tokens_from_those_that_generate() -> None:
    engine = Engine(num_blocks=64, max_num_batched_tokens=16, max_mixed_tokens=6)
    for number in (1, 2, 3):
        engine.add(make(f"r{number}", [number, 1]))
    engine.launch()
    engine.take_in()
    engine.add(make("r4", [2] * 20, priority=-1))
    for _ in range(3):
        parts = {part.request_id: part.num_tokens for part in engine.launch().requests}
        assert parts == {"r4": 3, "r1": 1, "r2": 1, "r3": 1}
        engine.take_in()
    engine.run()


def test_images_of_waiting_requests_are_encoded_together() -> None:
    engine = Engine(num_blocks=64, max_num_batched_tokens=4, encoder_capacity=24, encoder_budget=12)
    for number, image in enumerate((b"b", b"d", b"a", b"a", b"c")):
        engine.add(make(f"r{number}", [1], image))
    assert [image.hash for image in engine.launch().encode_images] == [b"b", b"d", b"a", b"c"]
    engine.take_in()
    assert not engine.launch().encode_images
    engine.run()


def test_images_ahead_take_half_of_the_cache() -> None:
    engine = Engine(num_blocks=64, max_num_batched_tokens=4, encoder_capacity=14, encoder_budget=12)
    for number, image in enumerate((b"b", b"d", b"a")):
        engine.add(make(f"r{number}", [1], image))
    assert [image.hash for image in engine.launch().encode_images] == [b"b", b"d"]
    engine.run()


def test_no_image_is_encoded_ahead_whose_keys_and_values_are_cached() -> None:
    engine = Engine(num_blocks=64, max_num_batched_tokens=8, encoder_capacity=24, encoder_budget=24)
    engine.add(make("r0", [1], b"a", [2, 3, 4, 5, 6]))
    engine.run()
    engine.scheduler.encoder_cache.clear()
    engine.add(make("r1", [1], b"b", [1] * 6))
    engine.add(make("r2", [1], b"a", [2, 3, 4, 5, 6], max_tokens=3))
    assert [image.hash for image in engine.launch().encode_images] == [b"b"]
    engine.run()


def test_images_encoded_ahead_are_still_there_when_their_turn_comes() -> None:
    """Requests wait for a place beside one that brings many images of its own."""
    names = [bytes([65 + i]) for i in range(13)]
    engine = Engine(num_blocks=64, max_num_seqs=1, max_num_batched_tokens=4, encoder_capacity=24, encoder_budget=12)

    def add(name: str, images: list[bytes]) -> None:
        placed = [ImageInput(image, 1 + 3 * i, 3, b"", (), "pixels") for i, image in enumerate(images)]
        tokens = [1] + [IMAGE_TOKEN] * 3 * len(images)
        engine.add(EngineRequest(name, tokens, SamplingParams(), 4, 0, images=placed, arrival_time=float(name[1:])))

    add("r0", names[:10])
    for number, image in enumerate(names[10:], start=1):
        add(f"r{number}", [image])
    encoded: list[bytes] = []
    while engine.scheduler.has_requests or engine.launched:
        encoded += [image.hash for image in engine.launch().encode_images]
        if engine.launched:
            engine.take_in()
    assert sorted(encoded) == names
