"""The engine process: a synchronous loop around the core, with one thread for input and one for output."""

import contextlib
import logging
import math
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq
from tqdm import tqdm

from engine.config import EngineConfig
from engine.core.engine_core import EngineCore
from engine.errors import ModelLoadError, one_line
from engine.log import configure_logging
from engine.messages import EngineOutput, EngineOutputs, EngineReady, EngineRequest

logger = logging.getLogger(__name__)

# The first frame of a message says what the second one holds.
ADD, ABORT, STOP = b"add", b"abort", b"stop"
READY, FAILED, OUTPUTS, ALIVE = b"ready", b"failed", b"outputs", b"alive"

HEARTBEAT_SECONDS = 1.0
"""After which the process says that it is there when it has nothing else to say."""
_IDLE_SECONDS = 1.0
"""Without work after which there is time to look whether all is in order."""

_MOST_STEP_SECONDS = 60.0
"""Of a GPU, which needs less than one. On a CPU a step may take as long as it likes: it does not hang."""

_Inbox = queue.SimpleQueue[tuple[bytes, Any]]


class StepWatch:
    """Notices a step that does not end: a GPU that hangs leaves its process alive.

    Args:
        most_seconds: that a step may take.
    """

    def __init__(self, most_seconds: float) -> None:
        self._most_seconds = most_seconds
        self._began = math.inf

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = math.inf

    @property
    def is_stuck(self) -> bool:
        """Asked by another thread."""
        return time.monotonic() - self._began > self._most_seconds


def run_engine(
    config: EngineConfig, inbox_address: str, outbox_address: str, log_level: str, log_format: str = "text"
) -> None:
    """Serve until told to stop, or until the parent is gone."""
    configure_logging(log_level, log_format)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is killed leaves to the system
    threading.Thread(target=_die_with_parent, args=([inbox_address, outbox_address],), daemon=True).start()
    context = zmq.Context()
    outbox = context.socket(zmq.PUSH)
    outbox.connect(outbox_address)
    try:
        core = EngineCore(config)
    except Exception as error:
        message = one_line(error)
        if isinstance(error, torch.OutOfMemoryError):
            flags = "--max-num-batched-tokens, --max-num-seqs or --gpu-memory-utilization"
            message = f"the GPU has too little memory: lower {flags} ({message})"
        elif not isinstance(error, ModelLoadError):
            logger.exception("the engine could not start")
        outbox.send_multipart([FAILED, message.encode()])
        context.destroy(linger=2000)
        return
    inbox = context.socket(zmq.PULL)
    inbox.connect(inbox_address)
    ready = EngineReady(core.max_model_len, core.runner.num_blocks)
    outbox.send_multipart([READY, msgspec.msgpack.encode(ready)])
    received: _Inbox = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(inbox, received, core), daemon=True).start()
    to_send: queue.SimpleQueue[EngineOutputs | None] = queue.SimpleQueue()
    watch = StepWatch(_MOST_STEP_SECONDS if config.device.type == "cuda" else math.inf)
    sender = threading.Thread(target=_send, args=(outbox, to_send, watch))
    sender.start()
    try:
        _loop(core, received, to_send, watch)
        core.close()
    finally:
        to_send.put(None)
        sender.join()
        # The receiving thread ends with the process.
        outbox.close(linger=1000)


def _loop(
    core: EngineCore, received: _Inbox, to_send: "queue.SimpleQueue[EngineOutputs | None]", watch: StepWatch
) -> None:
    while True:
        outputs: list[EngineOutput] = []
        aborted = False
        # All that has come is taken in before the next step: clients that leave must not cost a step each.
        while not received.empty() or not (core.has_work or outputs or aborted):
            kind, payload = _next(core, received)
            if kind == STOP:
                return
            if kind == ADD:
                outputs += core.add(payload)
            else:
                core.abort(payload)
                aborted = True
        if outputs or (aborted and not core.has_work):
            to_send.put(EngineOutputs(outputs, core.stats()))
        if core.has_work:
            with watch.step():
                outputs_of_step = core.step()
            to_send.put(outputs_of_step)


def _next(core: EngineCore, received: _Inbox) -> tuple[bytes, Any]:
    """The next message. While none comes and nothing is to be done, the caches are checked once."""
    try:
        return received.get(timeout=None if core.has_work else _IDLE_SECONDS)
    except queue.Empty:
        core.check_integrity()
        return received.get()


def _receive(inbox: zmq.Socket[bytes], received: _Inbox, core: EngineCore) -> None:
    """Put messages into the queue. If that fails nothing could be served any more, so the process ends."""
    try:
        _receive_until_stop(inbox, received, core)
    except Exception:
        logger.exception("requests can no longer be received")
        os._exit(1)


def _receive_until_stop(inbox: zmq.Socket[bytes], received: _Inbox, core: EngineCore) -> None:
    # Grammars are compiled in a thread of their own, so that nothing else waits. What gives such a request up goes
    # the same way, lest it be there before the request.
    compiling = ThreadPoolExecutor(1, thread_name_prefix="compile")
    late: set[str] = set()
    """Requests that are not received yet."""
    gone: set[str] = set()
    """Those of them that were given up."""

    def compiled(request: EngineRequest) -> None:
        if request.request_id not in gone:
            try:
                with contextlib.suppress(ValueError):  # which comes again, and is told, where the request is taken in
                    core.matcher(request)
            finally:
                received.put((ADD, request))
        late.discard(request.request_id)

    def forget(given_up: list[str]) -> None:
        gone.difference_update(given_up)
        received.put((ABORT, given_up))

    data: dict[bytes, bytes] = {}
    """Of the newest request's images, by hash."""
    requests = msgspec.msgpack.Decoder(EngineRequest)
    names = msgspec.msgpack.Decoder(list[str])
    while True:
        kind, payload = inbox.recv_multipart()
        if kind == ADD:
            request = requests.decode(payload)
            for image in request.images:
                image.data = image.data or data[image.hash]
            data = {image.hash: image.data for image in request.images}
            if request.grammar is None:
                received.put((kind, request))
            else:
                late.add(request.request_id)
                compiling.submit(compiled, request)
        elif kind == ABORT:
            given_up = names.decode(payload)
            behind = [name for name in given_up if name in late]
            if len(behind) < len(given_up):
                received.put((ABORT, [name for name in given_up if name not in behind]))
            if behind:
                gone.update(behind)
                compiling.submit(forget, behind)
        else:
            received.put((kind, None))
        if kind == STOP:
            return


def _send(outbox: zmq.Socket[bytes], to_send: "queue.SimpleQueue[EngineOutputs | None]", watch: StepWatch) -> None:
    """Send what is in the queue. If that fails nobody would hear of anything any more, so the process ends."""
    try:
        _send_until_stop(outbox, to_send, watch)
    except Exception:
        logger.exception("outputs can no longer be sent")
        os._exit(1)


def _send_until_stop(
    outbox: zmq.Socket[bytes], to_send: "queue.SimpleQueue[EngineOutputs | None]", watch: StepWatch
) -> None:
    encoder = msgspec.msgpack.Encoder()
    was_stuck = False
    while True:
        try:
            outputs = to_send.get(timeout=HEARTBEAT_SECONDS)
        except queue.Empty:
            if not watch.is_stuck:
                outbox.send_multipart([ALIVE, b""])
            elif not was_stuck:  # nothing is sent until it goes on, from which the server concludes
                logger.error("a step has taken more than %g s: the GPU seems to hang", _MOST_STEP_SECONDS)
            was_stuck = watch.is_stuck
            continue
        if outputs is None:
            return
        outbox.send_multipart([OUTPUTS, encoder.encode(outputs)])


def _die_with_parent(addresses: list[str]) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _remove_sockets(addresses)
        os._exit(1)


def _remove_sockets(addresses: list[str]) -> None:
    """And the folder that was made for them: the parent was killed, or it would have done so."""
    sockets = [Path(address.removeprefix("ipc://")) for address in addresses]
    with contextlib.suppress(OSError):
        for socket in sockets:
            socket.unlink(missing_ok=True)
        sockets[0].parent.rmdir()
