"""Starts the engine, listens, and drains at the end."""

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import uvicorn
import uvloop
from starlette.types import ASGIApp

from engine.args import EngineArgs
from engine.chat_template import ChatTemplate, find_template, read_template
from engine.client import AsyncEngine
from engine.config import EngineConfig, create_config
from engine.environment import fetch_timeout
from engine.errors import ModelLoadError, one_line
from engine.log import configure_logging
from engine.spawn import EngineProcess
from server.access_log import AccessLog
from server.app import RequestIdMiddleware, create_app
from server.args import ServerArgs, fail
from server.grammars import GrammarChecker
from server.http_protocol import LimitedProtocol
from server.images import ImagePreparer
from server.killable import KillableWorker
from server.media import MediaFetcher, MediaLimits
from server.metrics import Metrics
from server.prompts import TEMPLATE_SECONDS, TEMPLATES_AT_ONCE, make_renderer
from server.state import ServerState

if TYPE_CHECKING:
    from server.tracing import Traces

logger = logging.getLogger("server")

_FAREWELL_SECONDS = 2
"""That responses get to be written once nothing is generated any more."""


class _Server(uvicorn.Server):
    """Leaves signals to us, since requests drain before the listener closes."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing."""
        yield


def run(engine_args: EngineArgs, args: ServerArgs, process: EngineProcess) -> None:
    """Serve until told to stop; does not return: the exit status is 0 unless the engine died."""
    configure_logging(args.log_level, args.log_format)
    _allow_many_connections()
    traces: Traces | None = None
    try:
        traces = _traces(args)
        if args.chat_template is not None:
            args.chat_template = read_template(args.chat_template)
        config = create_config(engine_args)
        status = uvloop.run(_serve(config, args, process, traces))
    except ModelLoadError as error:
        fail(str(error), 1)
    except ValueError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        status = 0
    if traces is not None:
        traces.close()
    process.kill_if_idle()
    # Not SystemExit: it would wait for worker threads, which an image may keep busy for long.
    logging.shutdown()
    os._exit(status)


def _allow_many_connections() -> None:
    """Each takes a file descriptor, and a shell often allows a thousand only."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _traces(args: ServerArgs) -> "Traces | None":
    """Where spans go, if anywhere."""
    if args.otlp_traces_endpoint is None:
        return None
    try:
        from server.tracing import Traces
    except ImportError as error:
        raise ValueError("--otlp-traces-endpoint takes OpenTelemetry: python -m pip install '.[otel]'") from error
    try:
        return Traces(args.otlp_traces_endpoint)
    except ValueError as error:
        raise ValueError(f"OpenTelemetry's variables (OTEL_…) cannot be used: {error}") from error


async def _serve(config: EngineConfig, args: ServerArgs, process: EngineProcess, traces: "Traces | None") -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    listener = _listen(args)
    try:
        starting = asyncio.create_task(AsyncEngine.start(config, process))
        await asyncio.wait((starting, asyncio.create_task(stop.wait())), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        engine = starting.result()
        try:
            return await _listen_and_drain(_state(engine, args, traces), listener, stop, hurry)
        finally:
            await engine.stop()
    finally:
        listener.close()
        if args.uds is not None:
            Path(args.uds).unlink(missing_ok=True)


def _state(engine: AsyncEngine, args: ServerArgs, traces: "Traces | None" = None) -> ServerState:
    tokenizer = engine.inputs.tokenizer
    source = find_template(engine.config, args.chat_template, tokenizer)
    if source is None:
        logger.warning("the model has no chat template: chat requests will be refused (see --chat-template)")
    metrics = Metrics(engine.config.served_names[0], lambda: engine.stats)
    processors = os.cpu_count() or 4
    image_pool = ThreadPoolExecutor(processors, thread_name_prefix="image")
    limits = MediaLimits(
        timeout_s=fetch_timeout(),
        max_image_bytes=args.max_image_bytes,
        max_redirects=args.max_redirects,
        allowed_local_path=None if args.allowed_local_media_path is None else Path(args.allowed_local_media_path),
        allowed_domains=tuple(args.allowed_media_domains),
        allow_private_hosts=args.allow_private_media_hosts,
    )
    return ServerState(
        engine=engine,
        args=args,
        template=ChatTemplate(tokenizer, source, engine.inputs.image_token),
        media=MediaFetcher(limits, image_pool, on_fetch=metrics.image_fetched),
        images=ImagePreparer(
            engine.inputs.prepare_image,
            image_pool,
            at_once=processors,
            max_pixels=args.max_image_pixels,
            on_decode=metrics.image_decoded,
            on_prepare=metrics.image_prepared,
        ),
        metrics=metrics,
        text_pool=ThreadPoolExecutor(2, thread_name_prefix="text"),
        image_pool=image_pool,
        grammars=GrammarChecker(
            tokenizer.backend_tokenizer.to_str(), engine.config.vocab_size, engine.config.eos_token_ids
        ),
        request_templates=KillableWorker(
            make_renderer,
            engine.config,
            engine.inputs.image_token,
            engine.inputs.most_characters,
            seconds=TEMPLATE_SECONDS,
            most=TEMPLATES_AT_ONCE,
        ),
        traces=traces,
    )


def _listen(args: ServerArgs) -> socket.socket:
    """Claim the address before the model is loaded, so that a port which is taken is told at once."""
    try:
        if args.uds is not None:
            _remove_if_unused(Path(args.uds))
            return _bound(socket.AF_UNIX, args.uds)
        family, *_, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        return _bound(family, address)
    except OSError as error:
        place = args.uds or f"{args.host}:{args.port}"
        flag = "--port" if args.uds is None else "--uds"
        hint = f": choose another {flag}" if error.errno == errno.EADDRINUSE else ""
        raise ModelLoadError(f"cannot listen on {place}: {error.strerror or error}{hint}") from error


def _bound(family: int, address: Any) -> socket.socket:
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_if_unused(path: Path) -> None:
    """A socket that a server left behind goes; one that answers, and a file, stays, so that binding fails."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


async def _listen_and_drain(
    state: ServerState, listener: socket.socket, stop: asyncio.Event, hurry: asyncio.Event
) -> int:
    args = state.args
    app: ASGIApp = create_app(state)
    if not args.disable_log_requests:
        app = AccessLog(app)
    server = _Server(
        uvicorn.Config(
            RequestIdMiddleware(app),
            http=LimitedProtocol,
            ws="none",
            log_config=None,
            log_level=args.log_level,
            access_log=False,  # ours tells more, and no queries
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            timeout_graceful_shutdown=_FAREWELL_SECONDS,
            server_header=False,
            lifespan="off",
        )
    )
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started:
        if serving.done():
            raise ModelLoadError(f"cannot listen on {_url(args, listener)}: {one_line(_failure(serving))}")
        await asyncio.sleep(0.01)
    _say(f"Serving {', '.join(state.config.served_names)} at {_url(args, listener)}")
    if args.api_key:  # of which one may be a word that was meant as something else
        logger.info("clients must send the API key, one of %d", len(args.api_key))
    logger.info("ready %.1f s after the start", time.time() - psutil.Process().create_time())
    stopping, dying = asyncio.create_task(stop.wait()), asyncio.create_task(state.engine.dead.wait())
    await asyncio.wait((stopping, dying, serving), return_when=asyncio.FIRST_COMPLETED)
    if state.engine.dead.is_set():
        await asyncio.sleep(_FAREWELL_SECONDS)  # a moment in which /health tells why
    else:
        await _drain(state, hurry)
    died = state.engine.dead.is_set()
    server.should_exit = True
    await serving
    for task in (stopping, dying):
        task.cancel()
    await state.media.aclose()
    state.request_templates.kill()
    state.grammars.kill()
    state.text_pool.shutdown(wait=False, cancel_futures=True)
    state.image_pool.shutdown(wait=False, cancel_futures=True)
    return int(died)


async def _drain(state: ServerState, hurry: asyncio.Event) -> None:
    """Let running requests finish, for a while or until a second signal comes; abort those that do not."""
    state.draining = True
    state.idle.clear()
    if state.num_open:
        seconds = state.args.shutdown_timeout
        logger.info("shutting down: %d running, %g s to finish; once more to stop at once", state.num_open, seconds)
        waits = [asyncio.create_task(event.wait()) for event in (state.idle, hurry)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
    state.engine.fail_all("the server is shutting down")


def _say(line: str) -> None:
    """Print; a full disk or a reader that is gone is no reason not to serve."""
    try:
        print(line, flush=True)
    except OSError as error:
        logger.warning("standard output cannot be written: %s", error.strerror)


def _failure(task: "asyncio.Task[None]") -> BaseException:
    return task.exception() or RuntimeError("the listener ended")


def _url(args: ServerArgs, listener: socket.socket) -> str:
    if args.uds is not None:
        return f"unix:{args.uds}"
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if args.ssl_certfile else 'http'}://{shown}:{port}"
