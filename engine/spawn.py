"""Begins the engine process before there is anything for it to run, since importing its libraries takes seconds."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from engine.config import EngineConfig


class Assignment(NamedTuple):
    """What the process is to do."""

    config: "EngineConfig"
    inbox_address: str
    outbox_address: str


class EngineProcess:
    """A process that gets ready and waits for its `Assignment`."""

    def __init__(self, log_level: str, log_format: str = "text") -> None:
        context = multiprocessing.get_context("spawn")
        receiver, self._sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_main, args=(receiver, log_level, log_format), name="engine")
        self.process.start()
        receiver.close()
        self._is_idle = True

    def assign(self, assignment: Assignment) -> None:
        """Let it start."""
        self._is_idle = False
        self._sender.send(assignment)
        self._sender.close()

    def kill_if_idle(self) -> None:
        """End it unless it has been given something to do."""
        if self._is_idle:
            self._is_idle = False
            self.process.kill()
            self.process.join()


def _main(receiver: Connection, log_level: str, log_format: str) -> None:
    # A terminal sends Ctrl-C to both processes; the parent drains first and then says stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Threads that have done their part of a product stay awake for the next one, some milliseconds, and then sleep:
    # to wake them takes as long as a small product. Those that never sleep take the processor from the other process.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for other runtimes than GNU's
    from transformers import LlamaConfig  # noqa: F401 - the assignment holds one, and its imports take seconds too

    from engine.process import run_engine

    try:
        assignment: Assignment = receiver.recv()
    except EOFError:
        return  # the parent is gone
    run_engine(*assignment, log_level, log_format)
