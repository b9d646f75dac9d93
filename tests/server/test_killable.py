"""Work that does not end, or takes all memory, ends."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from engine.errors import QueueFullError
from server import killable
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

    if word == "broken":
        raise OSError("no such file")
    if word == "slow":
        time.sleep(60)
    return work


@pytest.fixture
def worker() -> Iterator[KillableWorker]:
    made = KillableWorker(make_work, "hello", seconds=0.5, most=5)
    yield made
    made.kill()


async def test_it_works_in_one_other_process(worker: KillableWorker) -> None:
    large = "x" * 3_000_000
    assert await worker.run("echo", large) == ["hello", large]
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
    with pytest.raises(EOFError):
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
    worker = KillableWorker(make_work, word, seconds=0.5, most=5)
    try:
        leaving = asyncio.create_task(worker.run("loop"))
        await asyncio.sleep(0.03)
        leaving.cancel()
        for number in range(3):
            assert await worker.run("echo", number) == [word, number]
    finally:
        worker.kill()


async def test_a_process_that_ended_while_idle_is_nobodys_fault(worker: KillableWorker) -> None:
    psutil.Process(await worker.run("pid")).kill()
    await asyncio.sleep(0.5)
    assert await worker.run("echo", 2) == ["hello", 2]


@pytest.mark.parametrize("word", ["broken", "slow"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_process_that_does_not_start_is_not_the_works_fault(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(killable, "_START_SECONDS", 1.0)
    worker = KillableWorker(make_work, word, seconds=0.5, most=5)
    with pytest.raises(RuntimeError, match="could not be started"):
        await worker.run("echo")
    worker.kill()


async def test_too_many_are_sent_away(worker: KillableWorker) -> None:
    results = await asyncio.gather(*(worker.run("echo", number) for number in range(8)), return_exceptions=True)
    assert results[:5] == [["hello", number] for number in range(5)]
    assert [type(result) for result in results[5:]] == [QueueFullError] * 3
    assert await worker.run("echo", 9) == ["hello", 9]


def test_it_ends_when_the_server_is_no_more() -> None:
    """Killed while the work never ends: nobody is left to end it."""
    code = (
        "import asyncio\n"
        "from server.killable import KillableWorker\n"
        "from tests.server.test_killable import make_work\n"
        "async def main():\n"
        "    worker = KillableWorker(make_work, 'hello', seconds=1, most=5)\n"
        "    print(await worker.run('pid'), flush=True)\n"
        "    worker._seconds = 60\n"
        "    await worker.run('loop')\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        child = psutil.Process(int(server.stdout.readline()))
        time.sleep(0.3)  # until it has the work
        server.kill()
    child.wait(10)
