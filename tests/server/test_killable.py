"""Work that does not end, or takes all memory, ends."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from server.killable import KillableWorker


def make_work(word: str) -> Callable[..., Any]:
    def work(kind: str, value: Any = None) -> Any:
        if kind == "echo":
            return word, value
        if kind == "pid":
            return os.getpid()
        if kind == "fail":
            raise KeyError("no")
        if kind == "die":
            os._exit(3)
        if kind == "grow":
            return len(bytearray(value))
        while True:
            pass

    return work


@pytest.fixture
def worker() -> Iterator[KillableWorker]:
    made = KillableWorker(make_work, "hello", seconds=0.5)
    yield made
    made.kill()


async def test_it_works_in_one_other_process(worker: KillableWorker) -> None:
    large = "x" * 3_000_000
    assert await worker.run("echo", large) == ("hello", large)
    pids = set(await asyncio.gather(*(worker.run("pid") for _ in range(5))))
    assert len(pids) == 1 and os.getpid() not in pids


async def test_a_failure_is_told(worker: KillableWorker) -> None:
    before = await worker.run("pid")
    with pytest.raises(ValueError, match="no"):
        await worker.run("fail")
    assert await worker.run("pid") == before


@pytest.mark.parametrize(("kind", "error"), [("loop", TimeoutError), ("die", EOFError)])
async def test_the_next_work_gets_a_new_process(worker: KillableWorker, kind: str, error: type[Exception]) -> None:
    before = await worker.run("pid")
    begun = time.monotonic()
    with pytest.raises(error):
        await worker.run(kind)
    assert time.monotonic() - begun < 5
    assert await worker.run("pid") != before
    assert not psutil.pid_exists(before)


async def test_memory_is_bounded(worker: KillableWorker) -> None:
    assert await worker.run("grow", 1 << 20) == 1 << 20
    with pytest.raises(ValueError, match="MemoryError"):
        await worker.run("grow", 4 << 30)


async def test_nobody_who_waits_is_no_work(worker: KillableWorker) -> None:
    before = await worker.run("pid")
    running, waiting = (asyncio.create_task(worker.run(kind)) for kind in ("loop", "pid"))
    await asyncio.sleep(0.1)
    running.cancel()
    assert await waiting != before
    assert running.cancelled() and not psutil.pid_exists(before)


async def test_who_leaves_while_the_process_begins_leaves_no_result_behind() -> None:
    """What takes too long for nobody must not be taken for the next one's answer."""
    word = "x" * 1_000_000  # more than a pipe holds: the process is begun once it has read it
    worker = KillableWorker(make_work, word, seconds=0.5)
    try:
        leaving = asyncio.create_task(worker.run("loop"))
        await asyncio.sleep(0.03)
        leaving.cancel()
        for number in range(3):
            assert await worker.run("echo", number) == (word, number)
    finally:
        worker.kill()


async def test_a_process_that_ended_while_idle_is_told_as_such(worker: KillableWorker) -> None:
    psutil.Process(await worker.run("pid")).kill()
    with pytest.raises(EOFError):
        await worker.run("echo", 1)
    assert await worker.run("echo", 2) == ("hello", 2)
