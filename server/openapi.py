"""The description of the API at /openapi.json.

Handlers read their bodies themselves and answer with dictionaries, so each route brings its description along.
"""

from functools import cached_property
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import TypeAdapter

from server.response_types import ErrorResponse

_REFERENCE = "#/components/schemas/{model}"
_DEFINITIONS = "$defs"
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
"""The ways to give an API key; one is enough."""
_JSON, _EVENTS = "application/json", "text/event-stream"

ABOUT = "Every answer other than 200 is an error object. An unknown path gives 404, a method not described here 405."

_ERRORS = {
    400: "A field, a query, an image or the body is wrong; the message says what and why.",
    401: "The API key is missing or wrong. Comes only where the server asks for one.",
    404: "There is no such model or response.",
    413: "The body is larger than the server allows.",
    415: "The content type is not JSON.",
    500: "The engine failed on this request.",
    503: "The queue is full, the server shuts down or the engine has stopped.",
}
_WITH_BODY = (400, 401, 404, 413, 415, 503)
_GENERATING = (400, 401, 404, 413, 415, 500, 503)


def describe_post(
    *bodies: Any, answer: Any, event: Any = None, is_named: bool = False, error: Any = ErrorResponse
) -> dict[str, Any]:
    """The description of an endpoint that takes one of several kinds of JSON bodies and may stream events.

    Args:
        bodies: types of the body.
        answer: type of the answer in one piece.
        event: type of the data of streamed events; where they are named, of errors too.
        is_named: whether events have names; else the last one is known by its data.
        error: type of every answer other than 200.
    """
    (*body_refs, answer_ref, event_ref, error_ref), definitions = _schemas(*bodies, answer, event, error)
    content = {_JSON: {"schema": answer_ref}}
    if event is not None:
        content[_EVENTS] = {"schema": _named_event(event_ref) if is_named else _unnamed_event(event_ref, error_ref)}
    errors = _errors(_WITH_BODY if event is None else _GENERATING, error_ref)
    return {
        "requestBody": {
            "required": True,
            "content": {_JSON: {"schema": {"anyOf": body_refs} if len(body_refs) > 1 else body_refs[0]}},
        },
        "responses": {"200": {"content": content}, **errors},
        _DEFINITIONS: definitions,
    }


def describe(answer: Any = None, *, errors: tuple[int, ...] = ()) -> dict[str, Any]:
    """The description of an endpoint without a body; an answer of None is not JSON."""
    (answer_ref, error_ref), definitions = _schemas(answer, ErrorResponse)
    responses = _errors(errors, error_ref)
    if answer is not None:
        responses["200"] = {"content": {_JSON: {"schema": answer_ref}}}
    return {"responses": responses, _DEFINITIONS: definitions}


class DescribedApp(FastAPI):
    """Collects the schemas that its routes brought along."""

    needs_key = False
    """Whether the operations that may answer 401 ask for an API key."""

    @cached_property
    def description_json(self) -> bytes:
        """What is sent of it: made once, since whoever has no key may ask for it too."""
        document = self.openapi()
        servers = {"servers": [{"url": self.root_path}]} if self.root_path else {}
        return msgspec.json.encode({**document, **servers})

    def openapi(self) -> dict[str, Any]:
        """The whole description, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            schemas: dict[str, Any] = {}
            for methods in document["paths"].values():
                for operation in methods.values():
                    for name, schema in operation.pop(_DEFINITIONS, {}).items():
                        if schemas.setdefault(name, schema) != schema:
                            raise ValueError(f"two types of requests or answers are named {name}")
                    operation["responses"].pop("422", None)  # FastAPI's own; a parameter of a path is never wrong
                    if self.needs_key and "401" in operation["responses"]:
                        operation["security"] = [{name: []} for name in _SECURITY]
            document["components"] = {"schemas": dict(sorted(schemas.items()))}
            if self.needs_key:
                document["components"]["securitySchemes"] = _SECURITY
        return super().openapi()


def _schemas(*kinds: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """References to the schemas of types, and the schemas that they need."""
    named = [(number, "validation", TypeAdapter(kind)) for number, kind in enumerate(kinds)]
    refs, schema = TypeAdapter.json_schemas(named, ref_template=_REFERENCE)  # type: ignore[arg-type]
    return [dict(refs[number, "validation"]) for number in range(len(kinds))], schema[_DEFINITIONS]


def _unnamed_event(data: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    last = {"const": "[DONE]", "description": "The end of the stream."}
    return _object(data={"anyOf": [_json_text({"anyOf": [data, error]}), last]})


def _named_event(data: dict[str, Any]) -> dict[str, Any]:
    return _object(event={"type": "string", "description": "The `type` of the data."}, data=_json_text(data))


def _json_text(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "string", "contentMediaType": _JSON, "contentSchema": schema}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _errors(statuses: tuple[int, ...], schema: dict[str, Any]) -> dict[str, Any]:
    retry = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string"}}}
    return {
        str(status): {
            "description": _ERRORS[status],
            "content": {_JSON: {"schema": schema}},
            **({"headers": retry} if status == 503 else {}),
        }
        for status in statuses
    }
