"""Errors as OpenAI's clients expect them, or Anthropic's on that path."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from engine.errors import EngineDeadError, QueueFullError
from server import notes
from server.paths import is_below
from server.protocol import REQUEST_FIELDS

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}
_UNION_TAGS = ("text", "image", "image_url", "base64", "url", "other")
"""Of content parts and of the sources of images."""
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")
_RETRY_SECONDS = "1"
_LONGEST_VALUE = 100
_LONGEST_STEP = 50
_LONGEST_PATH = 200
_LONGEST_MESSAGE = 1000
"""Characters; what a client sent may be quoted in it, and is cut."""


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "…"
        message = _ADDRESS.sub("0x…", message)  # which a client's template may print
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message or "error", "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's object, which has no place but the message to name the field."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        is_named = self.param is None or self.message.startswith(self.param)
        message = self.message if is_named else f"{self.param}: {self.message}"
        return {"type": "error", "error": {"type": kind, "message": message or "error"}}

    def response(self, scope: Scope) -> JSONResponse:
        """The whole answer to a request, in the form that its path asks for."""
        body = self.anthropic_body() if is_below(scope, "/v1/messages") else self.body()
        headers = {"Retry-After": _RETRY_SECONDS} if self.status == 503 else {}
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse(body, self.status, self.headers | headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param)


@contextmanager
def blaming(field: str) -> Iterator[None]:
    """A 400 for each `ValueError` inside; it names this field unless its message names another."""
    try:
        yield
    except ValueError as error:
        message = str(error) or "the request is not valid"
        raise bad_request(message, _named_field(message) or field) from error


def from_exception(error: BaseException) -> ApiError:
    """What a client is told about an exception; the unexpected ones are logged."""
    told = _told(error)
    notes.failed(told.status)
    return told


def _told(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError | EngineDeadError):
        return ApiError(503, str(error))
    if isinstance(error, ValidationError):
        return from_validation(error)
    if isinstance(error, ValueError):
        return bad_request(str(error) or "the request is not valid", _named_field(str(error)))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    logger.error("a request failed unexpectedly", exc_info=error)
    return ApiError(500, "the server failed to answer this request")


def from_validation(error: ValidationError) -> ApiError:
    """The first of pydantic's complaints, with the field's path and the value."""
    # Of the members of a union, the one that got furthest is the one that was meant.
    first = max(error.errors(include_url=False, include_context=False), key=lambda found: len(found["loc"]))
    place = ".".join(_fields(first["loc"])) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}")
    value = first.get("input")
    shown = f" (got {_short(value)})" if isinstance(value, str | int | float | bool) or value is None else ""
    if first["type"] == "missing":
        message, shown = "this field is required", ""
    return bad_request(f"{place}: {message}{shown}" if place else message, place)


def install_handlers(app: FastAPI) -> None:
    """Answer every exception, the framework's included, in one shape a path."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            error = ApiError(error.status_code, _not_served(request, error), headers=error.headers)
        told = from_exception(error)
        # Not the message, which may quote what the client sent, nor where in a field of the client's own keys it is.
        field = (told.param or told.code or "").partition(".")[0]
        path = ascii(request.url.path)[1:-1][:_LONGEST_PATH]
        name = request.scope.get("request_id", "")
        logger.info("%s %s refused: %d, %s, %s", request.method, path, told.status, field or "no field", name)
        return told.response(request.scope)

    for kind in (ApiError, HTTPException, ValidationError, ValueError, QueueFullError, EngineDeadError, Exception):
        app.add_exception_handler(kind, handle)


def _not_served(request: Request, error: HTTPException) -> str:
    """A 404's or 405's message, with what may have been meant."""
    asked = f"{request.method} {request.url.path[:200]}"
    allowed = (error.headers or {}).get("Allow")
    if allowed:
        return f"{asked} is not served: use {allowed}"
    meant = f"/v1{request.url.path}"
    if any(route.matches({**request.scope, "path": meant})[0] is Match.FULL for route in request.app.routes):
        return f"{asked} is not served: did you mean {meant[:200]}?"
    return f"{asked} is not served: see /docs for what is"


def _named_field(message: str) -> str | None:
    """The request field that a message begins with, as those of the engine do."""
    word = re.match(r"\w*", message)
    return word[0] if word and word[0] in REQUEST_FIELDS else None


def _fields(path: tuple[int | str, ...]) -> list[str]:
    """Pydantic's path without the steps that name members of unions: types, and kinds of parts and of sources."""
    kept: list[str] = []
    for before, step in zip(("", *path), path, strict=False):
        is_kind = (isinstance(before, int) or before == "source") and step in _UNION_TAGS
        is_type = isinstance(step, str) and ("[" in step or step in ("str", "int"))
        if not is_kind and not is_type:
            kept.append(ascii(step).strip("'\"")[:_LONGEST_STEP])  # it may be a key that the client chose
    return kept


def _short(value: Any) -> str:
    text = repr(value[: _LONGEST_VALUE + 1] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"
