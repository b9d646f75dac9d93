"""What the request handlers share."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from engine.chat_template import ChatTemplate
from engine.client import AsyncEngine
from engine.config import EngineConfig
from engine.input_processor import InputProcessor, PreparedImage
from engine.sampling_params import SamplingParams
from server import notes
from server.args import ServerArgs
from server.errors import ApiError
from server.grammars import GrammarChecker
from server.images import ImagePreparer
from server.killable import KillableWorker
from server.media import MediaFetcher
from server.metrics import Metrics
from server.request_model import RequestModel
from server.response_store import ResponseStore
from server.room import Room
from server.turns import CLIENT, Turns, client_of
from server.version import program_version

if TYPE_CHECKING:
    from server.tracing import Traces

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")

_VALUES = 1 << 16
_VALUES_PER_TOKEN = 16
"""A body may hold so many JSON values, and for each token of the context so many more: far above what any request
needs, and few enough that checking each takes no time that others would notice.
"""
_CONTAINERS = 1 << 15
"""And so many lists and objects, which take far more time and memory, with one more for each token of the context."""

_BODIES_AT_ONCE = 4
"""Bodies of the largest size that may be coming in together: the memory that clients take before they are admitted."""
_BODIES_HELD = 16
"""And so many that prompts are being made of."""

# A request of a hundred bytes may continue a conversation of many megabytes.
_CONTINUED_AT_ONCE = 4

# One request's images are fetched and decoded so many at a time, and leave room for others'.
_IMAGES_AT_ONCE = 8

_COUNTED_AT_ONCE = 1 << 20
# Bodies above this many bytes are parsed in a thread, so that others' tokens do not wait for it.
_PARSED_AT_ONCE = 64 << 10


@dataclass(slots=True)
class ServerState:
    """One server's engine, settings and helpers."""

    engine: AsyncEngine
    args: ServerArgs
    template: ChatTemplate
    media: MediaFetcher
    images: ImagePreparer
    metrics: Metrics
    text_pool: ThreadPoolExecutor
    """For tokenizers and templates."""
    image_pool: ThreadPoolExecutor
    grammars: GrammarChecker
    request_templates: KillableWorker
    """For chat templates that clients bring."""
    continuing: Turns = field(default_factory=lambda: Turns(_CONTINUED_AT_ONCE))
    """Held while what was kept of a conversation is in memory once more, to make a prompt of it."""
    draining: bool = False
    num_open: int = 0
    """Requests that are being answered."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    started: int = field(default_factory=lambda: int(time.time()))
    responses: ResponseStore = field(default_factory=ResponseStore)
    traces: "Traces | None" = None
    coming: Room = field(init=False)
    """For bodies that are coming in."""
    held: Room = field(init=False)
    """For those that have come, and that prompts are being made of."""

    def __post_init__(self) -> None:
        self.coming = Room(_BODIES_AT_ONCE * self.args.max_request_bytes)
        self.held = Room(_BODIES_HELD * self.args.max_request_bytes)

    @property
    def config(self) -> EngineConfig:
        """The engine's configuration."""
        return self.engine.config

    @property
    def inputs(self) -> InputProcessor:
        """The engine's input processor."""
        return self.engine.inputs

    @property
    def model_name(self) -> str:
        """The first of the names that the model is served under."""
        return self.config.served_names[0]

    @property
    def fingerprint(self) -> str:
        """Changes when answers may: another model, precision or version of this program."""
        described = f"{self.config.model_name} {self.config.dtype} {program_version()}"
        return "fp_" + hashlib.sha256(described.encode()).hexdigest()[:10]

    def check_model(self, name: str | None) -> str:
        """The served name that a request means; 404 for a name that is not served."""
        if name is None or name in self.config.served_names:
            return name or self.model_name
        served = ", ".join(self.config.served_names)
        message = f"the model {name[:100]!r} does not exist: {served} is served"
        raise ApiError(404, message, param="model", code="model_not_found")

    @asynccontextmanager
    async def open_request(self, request: Request) -> AsyncIterator[None]:
        """Count a request as running until it is answered; refuses it while the server shuts down."""
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        CLIENT.set(client_of(request.scope))
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1
            if not self.num_open:
                self.idle.set()

    async def in_text_pool(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run tokenizer or template work off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.text_pool, function, *args)

    async def bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Token ids of the bad words, if there are any."""
        return await self.in_text_pool(self.inputs.bad_words, params) if params.bad_words else []

    async def grammar(self, params: SamplingParams, field: str) -> str | None:
        """What the answer must look like, as the engine takes it.

        Raises:
            ValueError: it cannot be had; the message begins with the field that asks for it.
        """
        if params.structured_outputs is None:
            return None
        try:
            source = await self.in_text_pool(self.inputs.grammar, params)
            assert source is not None
            await self.grammars.check(source)
        except ValueError as error:
            raise ValueError(f"{field}: {str(error).removeprefix('structured_outputs: ')}") from None
        return source

    async def load_images(self, urls: list[str], cache_salt: str | None = None) -> list[PreparedImage]:
        """Fetch, decode and prepare images, all at once; the first failure ends the others."""
        if not urls:
            return []
        self.inputs.check_image_count(len(urls))
        if self.config.vision is not None and self.config.vision.processor is None:
            raise ValueError("the server runs with --disable-image-processor: it cannot prepare images")

        at_once = asyncio.Semaphore(_IMAGES_AT_ONCE)

        async def load(number: int, url: str) -> PreparedImage:
            async with at_once:
                try:
                    with notes.stage("fetch_image"):
                        data = await self.media.fetch(url)
                    with notes.stage("prepare_image"):
                        return await self.images.prepare(data, cache_salt)
                except ValueError as error:
                    which = f"image {number} of {len(urls)}: " if len(urls) > 1 else ""
                    raise ValueError(f"{which}{error}") from error

        tasks: list[asyncio.Task[PreparedImage]] = []
        failed: list[BaseException] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(load(number, url)) for number, url in enumerate(urls, start=1)]
            return [task.result() for task in tasks]
        except BaseExceptionGroup as errors:
            failed += errors.exceptions[:1]
            errors.__traceback__ = None  # whose frames hold the group too
        finally:
            # An error holds this frame, which through them would hold it: garbage of megabytes, collected late.
            del tasks, group
        raise failed.pop()  # here, where it does not get the group as its context, which holds it


def state_of(request: Request) -> ServerState:
    """The state of the application that a request came to."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state


async def read_body(request: Request, kind: type[Body]) -> Body:
    """Read and check a JSON body.

    Raises:
        ApiError: 413 above the size limit, 415 for another content type.
        ValidationError: it is malformed, or a field has the wrong type.
    """
    limit = state_of(request).args.max_request_bytes
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(415, f"content type {content_type[:100]!r} is not served: send application/json")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    body = await _read(request, limit)
    size = len(body)
    if not body:
        raise ApiError(400, "the body is empty: send a JSON object")
    if size <= _PARSED_AT_ONCE:
        return kind.model_validate_json(body)
    return await asyncio.to_thread(kind.model_validate_json, body)


async def _read(request: Request, limit: int) -> bytes:
    state, client = state_of(request), client_of(request.scope)
    count = _JsonCount(state, "the body")
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            state.coming.take(client, len(chunk))
            if size > limit:
                raise _too_large(limit)
            if state.coming.is_full_for(client) or state.held.is_full_for(client):
                raise ApiError(503, "too many large requests are coming in: try again later")
            count.add(chunk)
            chunks.append(chunk)
    finally:
        state.coming.give_back(client, size)
    held_body(request).hold(size)
    return b"".join(chunks)


class HeldBody:
    """What a request's body takes of the memory for all bodies, from when it has come until it is let go.

    Middleware makes one for each request, and lets go at its end at the latest.
    """

    def __init__(self, state: ServerState, client: Any) -> None:
        self._state = state
        self._client = client
        self._size = 0

    def hold(self, size: int) -> None:
        """It has come."""
        self._size += size
        self._state.held.take(self._client, size)

    def let_go(self) -> None:
        """Nothing of it is needed any more."""
        if self._size:
            self._state.held.give_back(self._client, self._size)
            self._size = 0


def held_body(request: Request) -> HeldBody:
    """Of a request."""
    held = request.scope["held_body"]
    assert isinstance(held, HeldBody)
    return held


def let_go(request: Request, body: RequestModel, *kept: str) -> None:
    """Forget all of a body but the fields whose names are given: the prompt is made, and answers may take long."""
    body.keep_only(*kept)
    held_body(request).let_go()


def check_size(state: ServerState, what: str, *texts: bytes) -> None:
    """Look at the size of JSON before it is parsed; `what` the texts are together, for the message. For a thread, where
    they may be large.

    Raises:
        ApiError: 413 above the limit of bytes, 400 above those of values.
    """
    if sum(map(len, texts)) > state.args.max_request_bytes:
        raise _too_large(state.args.max_request_bytes, what)
    count = _JsonCount(state, what)
    for text in texts:
        for start in range(0, len(text), _COUNTED_AT_ONCE):
            count.add(text[start : start + _COUNTED_AT_ONCE])


class _JsonCount:
    """What JSON holds, counted piece by piece before it is parsed."""

    def __init__(self, state: ServerState, what: str) -> None:
        self._what = what
        self._values = _VALUES + _VALUES_PER_TOKEN * state.inputs.max_model_len
        self._containers = _CONTAINERS + state.inputs.max_model_len
        self._commas = self._brackets = 0

    def add(self, piece: bytes) -> None:
        """Raises `ApiError` 400 when there are too many."""
        self._commas += piece.count(b",")
        self._brackets += piece.count(b"[") + piece.count(b"{")
        if self._commas > self._values:
            raise ApiError(400, f"{self._what} holds more than {self._values} JSON values (counted by its commas)")
        if self._brackets > self._containers:
            many = f"{self._containers} lists and objects (counted by its brackets)"
            raise ApiError(400, f"{self._what} holds more than {many}")


def _too_large(limit: int, what: str = "the body") -> ApiError:
    return ApiError(413, f"{what} is larger than the limit of {limit} bytes")
