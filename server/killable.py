"""Work on what clients bring that may never end, in a process that can be killed."""

import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from server.turns import Turns

_START_SECONDS = 60.0
"""For a new process to import what it needs."""
_MEMORY_BYTES = 2 << 30
"""That the process may take beside what it has when it is ready."""

_LONGEST_ERROR = 2000

Work = Callable[..., Any]


class KillableWorker:
    """Does one piece of work at a time, each within a time limit; the process is begun when it is first needed.

    Args:
        make_work: called in the process; gives the function that does the work.
        args: of `make_work`.
        seconds: that one piece of work may take.
        most: pieces that may wait or be done at once; see `Turns`.
    """

    def __init__(self, make_work: Callable[..., Work], *args: Any, seconds: float, most: int) -> None:
        self._make_work = make_work
        self._args = args
        self._seconds = seconds
        self._turns = Turns(1, most=most)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="killable")
        self._process: BaseProcess | None = None
        self._connection: Connection

    async def run(self, *args: Any) -> Any:
        """What the work gives.

        Raises:
            ValueError: it failed, with its own message.
            TimeoutError: it took too long.
            EOFError: it brought the process to its end, by what memory it takes or otherwise.
            QueueFullError: too many wait already.
            RuntimeError: there is no process to do it.
        """
        async with self._turns.turn():
            result, error = await self._in_thread(args)
        if error is not None:
            raise ValueError(error)
        return result

    async def _in_thread(self, args: tuple[Any, ...]) -> tuple[Any, str | None]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._exchange, args)
        except BaseException:  # cancelled too: nobody waits for the work any more
            self.kill()
            raise

    def kill(self) -> None:
        """End the process, if there is one. A thread that waits for it finds its connection ended."""
        process, self._process = self._process, None  # the thread and the loop may both come here
        if process is not None:
            process.kill()
            self._thread.submit(process.join)  # giving memory back may take a while

    def _exchange(self, args: tuple[Any, ...]) -> tuple[Any, str | None]:
        try:
            if self._process is None or not self._process.is_alive():  # it may have been killed by others
                self._begin()
            self._connection.send(args)
            done: tuple[Any, str | None] = self._receive(self._seconds)
            return done
        except BaseException as error:
            # Also where nobody waits any more: what is still to come must not be taken for the next one's.
            self.kill()
            if isinstance(error, ConnectionError):
                raise EOFError from error
            raise

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        args = theirs, self._make_work, self._args, self._seconds
        process = context.Process(target=_main, args=args, name="killable")
        process.start()
        self._process = process
        theirs.close()
        try:
            self._receive(_START_SECONDS)
        except (EOFError, OSError) as error:  # its own fault, not that of the work
            raise RuntimeError("the process that does what clients ask for could not be started") from error

    def _receive(self, seconds: float) -> Any:
        connection = self._connection
        if not connection.poll(seconds):
            raise TimeoutError
        return json.loads(connection.recv_bytes())  # not unpickled: a client's text may have broken out there


def _main(connection: Connection, make_work: Callable[..., Work], args: tuple[Any, ...], seconds: float) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent ends it
    work = make_work(*args)
    _limit_memory()
    connection.send_bytes(b"null")
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            given = connection.recv()
            signal.alarm(math.ceil(seconds) + 1)  # ends the process, should there be no parent left to do it
            connection.send_bytes(json.dumps(_done(work, given)).encode())
            signal.alarm(0)


def _done(work: Work, args: tuple[Any, ...]) -> tuple[Any, str | None]:
    try:
        return work(*args), None
    except MemoryError:
        os._exit(1)  # as it happens in libraries that cannot tell
    except Exception as error:
        return None, str(error)[:_LONGEST_ERROR] or type(error).__name__


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY_BYTES, size + _MEMORY_BYTES))
