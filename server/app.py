"""The FastAPI application."""

import hmac
import re
from typing import Any
from uuid import uuid4

import torch
import transformers
from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import chat, completions, messages, responses, tokenization
from server.api_docs import docs_routes
from server.errors import ApiError, install_handlers
from server.openapi import ABOUT, DescribedApp, describe
from server.pages import page_routes
from server.paths import is_below
from server.response_types import Model, ModelList, Versions
from server.sse import ClientGone
from server.state import HeldBody, ServerState, state_of
from server.turns import client_of
from server.version import program_version

router = APIRouter()

_CLIENT_CLOSED_REQUEST = 499
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_GUARDED = ("/v1", "/tokenize", "/detokenize")


def create_app(state: ServerState) -> FastAPI:
    """Build the application around an engine that runs."""
    app = DescribedApp(
        title="Vision-language model server",
        description=ABOUT,
        version=program_version(),
        openapi_url=None,  # see `description`
        docs_url=None,  # ours loads nothing from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the Host that a client names
    )
    app.root_path = state.args.root_path  # as an argument it is deprecated: uvicorn's own would change the paths
    app.needs_key = bool(state.args.api_key)
    app.state.server = state
    for routes in (router, chat.router, completions.router, responses.router, messages.router, tokenization.router):
        app.include_router(routes)
    app.router.routes.extend(docs_routes(app.title))
    if not state.args.disable_playground:
        app.router.routes.extend(page_routes(state.config))
    install_handlers(app)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_middleware(HeldBodyMiddleware, state=state)
    if state.traces is not None:  # inner: who has no key makes no spans
        app.add_middleware(state.traces.middleware)
    if state.args.api_key:
        app.add_middleware(ApiKeyMiddleware, keys=state.args.api_key)
    app.add_middleware(
        JsonCorsMiddleware, allow_origins=state.args.allowed_origins, allow_methods=["*"], allow_headers=["*"]
    )
    return app


class RequestIdMiddleware:
    """Gives each answer the name that its client gave the request, or a new one, in OpenAI's and Anthropic's header. It
    lies in the scope as `request_id`. Goes around the application, so that answers to what nobody expected have it too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid4().hex}".encode()
        scope["request_id"] = request_id.decode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = [(b"x-request-id", request_id), (b"request-id", request_id)]
                message = {**message, "headers": [*message.get("headers", []), *names]}
            await send(message)

        await self._app(scope, receive, send_named)


class HeldBodyMiddleware:
    """Counts the memory of a request's body until its end, unless it is let go sooner."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on (ASGI)."""
        held = scope["held_body"] = HeldBody(self._state, client_of(scope))
        try:
            await self._app(scope, receive, send)
        finally:
            held.let_go()


class JsonCorsMiddleware(CORSMiddleware):
    """Says what it refuses as everything else here does."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """What a browser asks for before it sends a request to another site."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        error = ApiError(response.status_code, bytes(response.body).decode())
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return JSONResponse(error.body(), error.status, kept)


class ApiKeyMiddleware:
    """Asks for a key on every path that costs anything, in OpenAI's header or Anthropic's, and leaves the one that is
    right in the scope as `api_key`, bytes.
    """

    def __init__(self, app: ASGIApp, keys: list[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or go on (ASGI)."""
        if scope["type"] == "http" and is_below(scope, *_GUARDED):
            scope["api_key"] = self._right_key(scope)
            if scope["api_key"] is None:
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                await error.response(scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _right_key(self, scope: Scope) -> bytes | None:
        given = []
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                given.append(value[7:].strip())
            elif name == b"x-api-key":
                given.append(value.strip())
        # Every key is compared, so that the time tells nothing about which one was nearly right.
        right = [key for one in given for key in self._keys if hmac.compare_digest(one, key)]
        return right[0] if right else None


@router.head("/health", include_in_schema=False)
@router.get("/health", response_class=Response, openapi_extra=describe(errors=(503,)))
async def health(request: Request) -> Response:
    """200 when a request would be served."""
    state = state_of(request)
    trouble = state.engine.trouble or ("the server is shutting down" if state.draining else None)
    if trouble is not None:
        raise ApiError(503, trouble)
    return Response()


@router.get("/openapi.json", include_in_schema=False)
async def description(request: Request) -> Response:
    """The description of the API."""
    return Response(request.app.description_json, media_type="application/json")


@router.get("/version", openapi_extra=describe(Versions))
async def versions() -> dict[str, str]:
    """Versions of this program and of what it stands on."""
    return {"version": program_version(), "torch": torch.__version__, "transformers": transformers.__version__}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    return Response(state_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", openapi_extra=describe(ModelList, errors=(401,)))
async def models(request: Request) -> dict[str, Any]:
    """The names under which the model is served."""
    state = state_of(request)
    return {"object": "list", "data": [_model(state, name) for name in state.config.served_names]}


@router.get("/v1/models/{name:path}", openapi_extra=describe(Model, errors=(401, 404)))
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of them."""
    state = state_of(request)
    return _model(state, state.check_model(name))


def _model(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "vlm-server",
        "root": name,
        "parent": None,
        "max_model_len": state.inputs.max_model_len,
    }


async def _client_gone(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(None, _CLIENT_CLOSED_REQUEST)
