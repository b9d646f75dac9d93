"""The engine process's loop, with a core that only notes what it is told."""

import os
import queue
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import zmq

from engine.messages import EngineOutput, EngineOutputs, SchedulerStats
from engine.process import ABORT, ADD, STOP, _loop, _receive, _send


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
    _loop(core, received, sent)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("work", [partial(_receive, core=Core()), _send])  # type: ignore[arg-type]
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
