"""The engine process's loop, with a core that only notes what it is told."""

import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
import zmq

from engine.messages import EngineOutput, EngineOutputs, EngineRequest, ImageInput, SchedulerStats
from engine.process import ABORT, ADD, ALIVE, STOP, StepWatch, _loop, _receive, _receive_until_stop, _send
from engine.sampling_params import SamplingParams


class Core:
    """Works until told that all requests are gone."""

    def __init__(self) -> None:
        self.requests: set[str] = set()
        self.told: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, name: str) -> list[EngineOutput]:
        self.told.append(f"add {name}")
        if name == "bad":
            return [EngineOutput(name, [], finish_reason="error", error="bad")]
        self.requests.add(name)
        return []

    def abort(self, names: list[str]) -> None:
        self.told.append("abort " + " ".join(names))
        self.requests -= set(names)

    def step(self) -> EngineOutputs:
        self.told.append("step")
        return EngineOutputs([], SchedulerStats())

    def stats(self) -> SchedulerStats:
        return SchedulerStats()


class Sent(list[EngineOutputs]):
    """Stops the loop when the last thing that the test waits for was sent."""

    def __init__(self, received: "queue.SimpleQueue[Any]", wanted: int) -> None:
        super().__init__()
        self._received, self._wanted = received, wanted

    def put(self, outputs: EngineOutputs) -> None:
        self.append(outputs)
        if len(self) == self._wanted:
            self._received.put((STOP, None))


def run(*messages: tuple[bytes, Any], sends: int) -> tuple[list[str], Sent]:
    core, received = Core(), queue.SimpleQueue[Any]()
    for message in messages:
        received.put(message)
    sent = Sent(received, sends)
    _loop(core, received, sent, StepWatch(1))  # type: ignore[arg-type]
    return core.told, sent


def test_clients_that_leave_cost_no_step_each() -> None:
    messages = [(ADD, name) for name in "abcd"] + [(ABORT, [name]) for name in "abc"]
    told, _ = run(*messages, sends=1)
    assert told == ["add a", "add b", "add c", "add d", "abort a", "abort b", "abort c", "step"]


def test_what_is_refused_is_told_before_the_next_step() -> None:
    told, sent = run((ADD, "a"), (ADD, "bad"), sends=2)
    assert told == ["add a", "add bad", "step"]
    assert [output.error for output in sent[0].outputs] == ["bad"]
    assert not sent[1].outputs


def test_when_all_have_left_the_queues_are_told() -> None:
    told, sent = run((ADD, "a"), (ABORT, ["a"]), sends=1)
    assert told == ["add a", "abort a"]
    assert sent == [EngineOutputs([], SchedulerStats())]


@pytest.mark.parametrize("work", [partial(_receive, core=Core()), partial(_send, watch=StepWatch(1))])  # type: ignore[arg-type]
def test_a_thread_that_fails_ends_the_process(
    work: Callable[[Any, Any], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that hears or says nothing would keep its clients waiting for ever."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    waiting.put(EngineOutputs([], SchedulerStats()))
    with zmq.Context() as context:
        broken = context.socket(zmq.PAIR)
        broken.close()
        work(broken, waiting)
    assert statuses == [1] and "can no longer be" in caplog.text


def test_a_step_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The process says that it is alive while a step takes its time, no more when it takes too long, and then again."""
    monkeypatch.setattr("engine.process.HEARTBEAT_SECONDS", 0.05)
    to_send: queue.SimpleQueue[Any] = queue.SimpleQueue()
    watch = StepWatch(0.5)
    with zmq.Context() as context, context.socket(zmq.PULL) as server, context.socket(zmq.PUSH) as outbox:
        server.setsockopt(zmq.RCVTIMEO, 10_000)
        server.bind("inproc://outbox")
        outbox.connect("inproc://outbox")
        sender = threading.Thread(target=_send, args=(outbox, to_send, watch))
        sender.start()
        with watch.step():
            assert server.recv_multipart()[0] == ALIVE
            time.sleep(1)
            while server.poll(0):
                server.recv_multipart()
            assert not server.poll(300)
        assert server.recv_multipart()[0] == ALIVE
        to_send.put(None)
        sender.join()
    assert caplog.text.count("seems to hang") == 1


class Compiling:
    """A core that compiles grammars for as long as the test wants, or fails."""

    def __init__(self) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def matcher(self, request: EngineRequest) -> None:
        self.has_begun.set()
        assert self.may_go_on.wait(10)
        if request.grammar == "bad":
            raise ValueError("bad")
        if request.grammar == "fatal":
            raise BaseException("no error that anybody expects")


def message(name: str, grammar: str | None) -> list[bytes]:
    return [ADD, msgspec.msgpack.encode(EngineRequest(name, [1], SamplingParams(), 1, 0, grammar=grammar))]


def test_compiling_holds_up_nothing_but_what_comes_behind_it() -> None:
    """A request without a grammar overtakes; what gives one up comes after it, lest it be unknown."""
    received, core = queue.SimpleQueue[Any](), Compiling()

    class Inbox:
        messages = iter([
            message("good", "good"), message("bad", "bad"), message("fatal", "fatal"),
            [ABORT, msgspec.msgpack.encode(["good"])], message("plain", None), [STOP, msgspec.msgpack.encode(None)],
        ])  # fmt: skip

        def recv_multipart(self) -> list[bytes]:
            sent = next(self.messages)
            return sent if sent[0] != ABORT or core.has_begun.wait(5) else []

    _receive_until_stop(Inbox(), received, core)  # type: ignore[arg-type]
    first = [received.get(timeout=5) for _ in range(2)]
    assert [kind for kind, _ in first] == [ADD, STOP] and first[0][1].request_id == "plain"
    core.may_go_on.set()
    others = [received.get(timeout=5) for _ in range(4)]
    assert [payload.request_id for _, payload in others[:3]] == ["good", "bad", "fatal"]
    assert others[3] == (ABORT, ["good"])


def test_answers_to_one_prompt_share_its_images() -> None:
    """Their data comes with the first, and is there once."""
    received = queue.SimpleQueue[Any]()

    def sent_image(name: str, data: bytes) -> list[bytes]:
        images = [ImageInput(b"hash", 0, 1, data, (1, 1, 3), "pixels")]
        return [ADD, msgspec.msgpack.encode(EngineRequest(name, [1], SamplingParams(), 1, 0, images=images))]

    sent = iter([
        sent_image("a/0", b"pixels of a"), sent_image("a/1", b""), sent_image("b/0", b"pixels of b"),
        sent_image("b/1", b""), [STOP, msgspec.msgpack.encode(None)],
    ])  # fmt: skip

    class Inbox:
        def recv_multipart(self) -> list[bytes]:
            return next(sent)

    _receive_until_stop(Inbox(), received, Compiling())  # type: ignore[arg-type]
    data = [received.get(timeout=5)[1].images[0].data for _ in range(4)]
    assert data == [b"pixels of a"] * 2 + [b"pixels of b"] * 2
    assert data[0] is data[1] and data[2] is data[3]


def test_what_is_given_up_before_its_turn_is_not_compiled() -> None:
    received, core = queue.SimpleQueue[Any](), Compiling()
    sent = iter([
        message("first", "good"), message("second", "good"), [ABORT, msgspec.msgpack.encode(["second"])],
        [STOP, msgspec.msgpack.encode(None)],
    ])  # fmt: skip

    class Inbox:
        def recv_multipart(self) -> list[bytes]:
            return next(sent)

    _receive_until_stop(Inbox(), received, core)  # type: ignore[arg-type]
    core.may_go_on.set()
    found = [received.get(timeout=5) for _ in range(3)]
    assert [kind for kind, _ in found] == [STOP, ADD, ABORT] and found[1][1].request_id == "first"


def test_what_gives_up_a_plain_request_waits_for_no_compiler() -> None:
    received, core = queue.SimpleQueue[Any](), Compiling()
    sent = iter([
        message("formed", "good"), message("plain", None), [ABORT, msgspec.msgpack.encode(["plain", "formed"])],
        [STOP, msgspec.msgpack.encode(None)],
    ])  # fmt: skip

    class Inbox:
        def recv_multipart(self) -> list[bytes]:
            return next(sent)

    _receive_until_stop(Inbox(), received, core)  # type: ignore[arg-type]
    found = [received.get(timeout=5) for _ in range(3)]
    assert [kind for kind, _ in found] == [ADD, ABORT, STOP] and found[1][1] == ["plain"]
    core.may_go_on.set()
    others = list(iter(partial(received.get, timeout=5), (ABORT, ["formed"])))
    assert [kind for kind, _ in others] in ([], [ADD])  # compiling had begun, or had not
