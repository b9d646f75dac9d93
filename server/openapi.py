"""The description of the API at /openapi.json.

Handlers read their bodies themselves and answer with dictionaries, so each route brings its description along.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from server.response_types import ErrorResponse

_REFERENCE = "#/components/schemas/{model}"
_DEFINITIONS = "$defs"
_BEARER = "bearer"
_JSON, _EVENTS = "application/json", "text/event-stream"

ABOUT = "Every answer other than 200 is an error object. An unknown path gives 404, a method not described here 405."

_ERRORS = {
    400: "A field, an image or the body is wrong; the message says what and why.",
    401: "The API key is missing or wrong. Comes only where the server asks for one.",
    404: "There is no such model.",
    413: "The body is larger than the server allows.",
    415: "The content type is not JSON.",
    500: "The engine failed on this request.",
    503: "The queue is full, the server shuts down or the engine has stopped.",
}
_WITH_BODY = (400, 401, 404, 413, 415, 503)
_GENERATING = (400, 401, 404, 413, 415, 500, 503)


def describe_post(*bodies: Any, answer: Any, event: Any = None) -> dict[str, Any]:
    """The description of an endpoint that takes one of several kinds of JSON bodies and may stream events."""
    refs, definitions = _schemas(*bodies, answer, event)
    body: dict[str, Any] = {"anyOf": refs[: len(bodies)]} if len(bodies) > 1 else refs[0]
    content = {_JSON: {"schema": refs[len(bodies)]}}
    if event is not None:
        told = "The data of each server-sent event, or else an error object; the last data is `[DONE]`."
        content[_EVENTS] = {"schema": {**refs[-1], "description": told}}
    return {
        "requestBody": {"required": True, "content": {_JSON: {"schema": body}}},
        "responses": {"200": {"content": content}, **_errors(_WITH_BODY if event is None else _GENERATING)},
        _DEFINITIONS: definitions,
    }


def describe_get(answer: Any = None, *, errors: tuple[int, ...] = ()) -> dict[str, Any]:
    """The description of an endpoint without a body; an answer of None is not JSON."""
    refs, definitions = _schemas(answer)
    responses = _errors(errors)
    if answer is not None:
        responses["200"] = {"content": {_JSON: {"schema": refs[0]}}}
    return {"responses": responses, _DEFINITIONS: definitions}


class DescribedApp(FastAPI):
    """Collects the schemas that its routes brought along."""

    needs_key = False
    """Whether the operations that may answer 401 ask for an API key."""

    def openapi(self) -> dict[str, Any]:
        """The whole description, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            schemas: dict[str, Any] = {}
            for methods in document["paths"].values():
                for operation in methods.values():
                    schemas |= operation.pop(_DEFINITIONS, {})
                    operation["responses"].pop("422", None)  # FastAPI's own; a parameter of a path is never wrong
                    if self.needs_key and "401" in operation["responses"]:
                        operation["security"] = [{_BEARER: []}]
            document["components"] = {"schemas": dict(sorted(schemas.items()))}
            if self.needs_key:
                document["components"]["securitySchemes"] = {_BEARER: {"type": "http", "scheme": "bearer"}}
        return super().openapi()


def _schemas(*kinds: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """References to the schemas of types, and the schemas that they need; those of errors always."""
    named = [(number, "validation", TypeAdapter(kind)) for number, kind in enumerate((*kinds, ErrorResponse))]
    refs, schema = TypeAdapter.json_schemas(named, ref_template=_REFERENCE)  # type: ignore[arg-type]
    return [dict(refs[number, "validation"]) for number in range(len(kinds))], schema[_DEFINITIONS]


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model=ErrorResponse.__name__)}
    retry = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string"}}}
    return {
        str(status): {
            "description": _ERRORS[status],
            "content": {_JSON: {"schema": schema}},
            **({"headers": retry} if status == 503 else {}),
        }
        for status in statuses
    }
