"""The API process's side of the engine: starts the process, sends requests, hands out text as it comes."""

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq
import zmq.asyncio

from engine.config import EngineConfig
from engine.errors import EngineDeadError, ModelLoadError, QueueFullError
from engine.input_processor import InputProcessor, ProcessedPrompt
from engine.messages import EngineOutput, EngineOutputs, EngineReady, EngineRequest, SchedulerStats
from engine.output_processor import OutputProcessor
from engine.outputs import Delta
from engine.process import ABORT, ADD, ALIVE, FAILED, HEARTBEAT_SECONDS, OUTPUTS, STOP
from engine.sampling_params import SamplingParams
from engine.spawn import Assignment, EngineProcess

logger = logging.getLogger(__name__)

_STOP_SECONDS = 5.0
_FEW_ANSWERS = 32
"""That one request may have however short the queue is; else it may fill half of it."""
_SILENT_SECONDS = 10 * HEARTBEAT_SECONDS
"""After which an engine process that says nothing is taken for one that stands still."""


class ResponseStream:
    """The deltas of one request's answers. Leaving the `async with` block early aborts what still runs.

    A reader that is slower than the engine gets merged deltas: at most one waits for each answer.
    """

    def __init__(self, engine: "AsyncEngine", requests: list[EngineRequest]) -> None:
        self._engine = engine
        self._running = {request.request_id for request in requests}
        self._waiting: dict[int, Delta] = {}
        self._news = asyncio.Event()
        self._error: Exception | None = None

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        """The next delta of any answer.

        Raises:
            EngineDeadError: the engine process ended.
        """
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if not self._running:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.pop(next(iter(self._waiting)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    @property
    def num_running(self) -> int:
        """Answers that are not complete."""
        return len(self._running)

    def abort(self) -> None:
        """Stop the answers that still run."""
        running, self._running = self._running, set()
        if running:
            self._engine.abort(running)

    def put(self, request_id: str, delta: Delta) -> None:
        """Add a delta (the engine calls this)."""
        waiting = self._waiting.get(delta.index)
        if waiting is None:
            self._waiting[delta.index] = delta
        else:
            waiting.merge(delta)
        if delta.finish_reason is not None:
            self._running.discard(request_id)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End with an error (the engine calls this)."""
        self._error = error
        self._news.set()


class AsyncEngine:
    """The engine in a process of its own, for one event loop.

    engine = await AsyncEngine.start(config)
    prompt = engine.inputs.process(engine.inputs.encode("Hello"), [])
    async with engine.generate(prompt, SamplingParams()) as stream:
        async for delta in stream: ...
    await engine.stop()
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.inputs: InputProcessor
        self.stats = SchedulerStats()
        """The newest that the engine process sent."""
        self.dead = asyncio.Event()
        """Set when the engine process has ended, wanted or not."""
        self._num_claimed = 0
        self._heard_at = time.monotonic()
        self._outputs: OutputProcessor
        self._process: BaseProcess
        self._streams: dict[str, ResponseStream] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, config: EngineConfig, process: EngineProcess | None = None) -> Self:
        """Let the engine process, one begun earlier or a new one, load the model, and wait until it serves.

        Raises:
            ModelLoadError: it could not.
        """
        engine = cls(config)
        engine._open_sockets()
        begun = process or EngineProcess("info")
        engine._process = begun.process
        inputs = asyncio.create_task(asyncio.to_thread(InputProcessor, config, config.max_model_len))
        try:
            engine._assign(begun, config)
            ready = await engine._wait_until_ready()
            engine.inputs = await inputs
            engine.inputs.max_model_len = ready.max_model_len
            engine._outputs = OutputProcessor(engine.inputs.tokenizer)
        except BaseException:
            inputs.cancel()
            await engine.stop()
            raise
        engine._heard_at = time.monotonic()  # however long it loaded
        receiving = asyncio.create_task(engine._receive())
        receiving.add_done_callback(engine._stopped_receiving)
        engine._tasks.append(receiving)
        return engine

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return not self.dead.is_set()

    @property
    def trouble(self) -> str | None:
        """Why no request would be served; None where nothing is wrong."""
        if not self.is_alive:
            return "the engine has stopped"
        if time.monotonic() - self._heard_at > _SILENT_SECONDS:
            return "the engine does not respond"
        return None

    @property
    def num_active(self) -> int:
        """Answers that run or wait."""
        return len(self._streams)

    @contextlib.contextmanager
    def admission(self, count: int) -> Any:
        """Claim places in the queue for `count` answers, before any work is spent on their prompt.

        Raises:
            ValueError: they are more than one request may have.
            QueueFullError: as many wait as are allowed to.
            EngineDeadError: the engine process ended.
        """
        if self.trouble is not None:
            raise EngineDeadError(self.trouble)
        room = self.config.max_num_seqs + self.config.max_num_queued_reqs
        most = max(room // 2, _FEW_ANSWERS)
        if count > most:
            raise ValueError(f"n asks for {count} answers to all prompts together: at most {most} are allowed here")
        full = self.stats.num_waiting > self.config.max_num_queued_reqs
        if full or self.num_active + self._num_claimed + count > max(room, count):
            raise QueueFullError
        self._num_claimed += count
        try:
            yield
        finally:
            self._num_claimed -= count

    def generate(
        self,
        prompt: ProcessedPrompt,
        params: SamplingParams,
        *,
        max_tokens: int | None = None,
        bad_words: list[list[int]] | None = None,
        grammar: str | None = None,
        arrival_time: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
        request_id: str | None = None,
    ) -> ResponseStream:
        """Send a request to the engine.

        Args:
            prompt: made by `inputs.process`.
            params: how to sample; `params.max_tokens` of None fills the context.
            max_tokens: made by `inputs.max_tokens`; by default it is called with `params.max_tokens`.
            bad_words: made by `inputs.bad_words`; by default it is called with `params`.
            grammar: made by `inputs.grammar`; likewise.
            arrival_time: when the client asked, in seconds of `time.monotonic()`; by default now.
            priority: lower is served first.
            cache_salt: prompts and images share what is cached only with those of the same salt.
            request_id: for the log; must be unique.

        Raises:
            ValueError: the parameters do not fit the model or the prompt.
            EngineDeadError: the engine process ended.
        """
        if not self.is_alive:
            raise EngineDeadError
        requests = self.inputs.make_requests(
            prompt,
            params,
            max_tokens=self.inputs.max_tokens(prompt, params.max_tokens) if max_tokens is None else max_tokens,
            arrival_time=time.monotonic() if arrival_time is None else arrival_time,
            bad_words=bad_words,
            grammar=grammar,
            priority=priority,
            cache_salt=cache_salt,
            request_id=request_id,
        )
        stream = ResponseStream(self, requests)
        self._outputs.add(requests)
        self._streams |= {request.request_id: stream for request in requests}
        try:
            self._send(ADD, requests[0])
            # The others' images are the first one's, and go with it.
            images = [replace(image, data=b"") for image in requests[0].images]
            for request in requests[1:]:
                self._send(ADD, replace(request, images=images))
        except BaseException:
            stream.abort()
            raise
        return stream

    def abort(self, request_ids: set[str]) -> None:
        """Drop answers; streams of theirs get nothing more."""
        for request_id in request_ids:
            self._streams.pop(request_id, None)
            self._outputs.remove(request_id)
        if self.is_alive:
            self._send(ABORT, sorted(request_ids))

    def fail_all(self, reason: str) -> None:
        """Abort everything; each stream ends with an error that gives the reason."""
        running = set(self._streams)
        self._fail_streams(EngineDeadError(reason))
        if running:
            self.abort(running)

    async def stop(self) -> None:
        """End the engine process and every stream."""
        self._fail_streams()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process.is_alive():
            with contextlib.suppress(zmq.Again):  # it does not listen: it still loads, or could not
                self._send(STOP, None)
                await asyncio.to_thread(self._process.join, _STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        self.dead.set()
        self._process.close()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _open_sockets(self) -> None:
        # Only this user may enter the folder, and so speak to the engine.
        self._folder = Path(tempfile.mkdtemp(prefix="engine-"))
        self._context = zmq.asyncio.Context()
        self._inbox = self._context.socket(zmq.PUSH)
        self._outbox = self._context.socket(zmq.PULL)
        for socket, name in ((self._inbox, "in"), (self._outbox, "out")):
            socket.set_hwm(0)
            socket.bind(self._address(name))
        self._encoder = msgspec.msgpack.Encoder()

    def _address(self, name: str) -> str:
        return f"ipc://{self._folder / name}"

    def _assign(self, begun: EngineProcess, config: EngineConfig) -> None:
        try:
            begun.assign(Assignment(config, self._address("in"), self._address("out")))
        except OSError as error:
            begun.process.join(_STOP_SECONDS)
            status = begun.process.exitcode
            raise ModelLoadError(f"the engine process ended at its start (exit status {status})") from error

    async def _wait_until_ready(self) -> EngineReady:
        while not await self._outbox.poll(100):
            if not self._process.is_alive():
                raise ModelLoadError(f"the engine process ended at its start (exit status {self._process.exitcode})")
        kind, payload = await self._outbox.recv_multipart()
        if kind == FAILED:
            raise ModelLoadError(payload.decode())
        await self._inbox.poll(int(_STOP_SECONDS * 1000), zmq.POLLOUT)  # type: ignore[call-arg]
        self._tasks.append(asyncio.create_task(self._watch()))
        return msgspec.msgpack.decode(payload, type=EngineReady)

    def _send(self, kind: bytes, message: Any) -> None:
        # The queue of the socket has no bound and the peer is local: this never waits. Admission bounds it.
        zmq.Socket.send_multipart(self._sync_inbox, [kind, self._encoder.encode(message)], zmq.NOBLOCK)

    @property
    def _sync_inbox(self) -> zmq.Socket[bytes]:
        return zmq.Socket.shadow(self._inbox.underlying)

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(EngineOutputs)
        while True:
            kind, payload = await self._outbox.recv_multipart()
            self._heard_at = time.monotonic()
            if kind == ALIVE:
                continue
            assert kind == OUTPUTS
            received = decoder.decode(payload)
            self.stats = received.stats
            now = time.monotonic()
            for output in received.outputs:
                try:
                    self._deliver(output, now)
                except Exception:
                    logger.exception("an answer could not be put together; its request ends with an error")
                    self._give_up(output.request_id)

    def _deliver(self, output: EngineOutput, now: float) -> None:
        processed = self._outputs.process(output, now)
        if processed is None:
            return
        delta, must_abort = processed
        self._streams[output.request_id].put(output.request_id, delta)
        if delta.finish_reason is not None:
            del self._streams[output.request_id]
        if must_abort:
            self._send(ABORT, [output.request_id])

    def _give_up(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.abort()
            stream.fail(RuntimeError("an answer could not be put together"))

    def _stopped_receiving(self, task: asyncio.Task[None]) -> None:
        """Without answers nothing is served: better seen to be dead than silent."""
        if not task.cancelled():
            logger.error("answers can no longer be received", exc_info=task.exception())
            self._fail_streams()
            self.dead.set()

    async def _watch(self) -> None:
        """Notice the end of the engine process."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        logger.error("the engine process ended unexpectedly (exit status %s)", self._process.exitcode)
        self._fail_streams()
        self.dead.set()

    def _fail_streams(self, error: EngineDeadError | None = None) -> None:
        streams, self._streams = set(self._streams.values()), {}
        for stream in streams:
            stream.fail(error or EngineDeadError())
