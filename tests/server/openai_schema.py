"""JSON schemas of OpenAI's response objects, after its published description of the API.

Required keys and types are OpenAI's. Keys that it does not know are refused, except those that this server documents.
"""

from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
NULL: Schema = {"type": "null"}
TOKEN_IDS: Schema = {"type": "array", "items": COUNT}
STOP_REASON: Schema = {"type": ["string", "integer", "null"]}


def _object(required: Schema, optional: Schema | None = None) -> Schema:
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


# This server's own.
_PROMPT_LOGPROB = _object({"logprob": NUMBER, "rank": {"type": "integer", "minimum": 1}, "decoded_token": STRING})
_PROMPT_LOGPROBS = _array(_or_null(_map(_PROMPT_LOGPROB)))
_CHOICE_EXTENSIONS = {"stop_reason": STOP_REASON, "token_ids": TOKEN_IDS}
_PROMPT_EXTENSIONS = {"prompt_token_ids": TOKEN_IDS, "prompt_logprobs": _PROMPT_LOGPROBS}
_IMAGE_TOKENS = {"image_tokens": COUNT}

_USAGE = _object(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    {
        "prompt_tokens_details": _object({}, {"cached_tokens": COUNT, "audio_tokens": COUNT} | _IMAGE_TOKENS),
        "completion_tokens_details": _map(COUNT),
    },
)
_HEAD = {"id": STRING, "created": COUNT, "model": STRING}
_OPTIONAL_HEAD = {"system_fingerprint": STRING, "service_tier": _or_null(STRING)}

_BYTES = _or_null(_array({"type": "integer", "minimum": 0, "maximum": 255}))
_TOP_LOGPROB = {"token": STRING, "logprob": NUMBER, "bytes": _BYTES}
_TOKEN_LOGPROB = _object(_TOP_LOGPROB | {"top_logprobs": _array(_object(_TOP_LOGPROB))})
_CHAT_LOGPROBS = _object(
    {"content": _or_null(_array(_TOKEN_LOGPROB)), "refusal": _or_null(_array(_TOKEN_LOGPROB))},
)
_FINISH_REASON: Schema = {"enum": ["stop", "length", "tool_calls", "content_filter", "function_call"]}

_TOOL_CALL = _object(
    {"id": STRING, "type": {"const": "function"}, "function": _object({"name": STRING, "arguments": STRING})}
)
_TOOL_CALL_CHUNK = _object(
    {"index": COUNT},
    {
        "id": STRING,
        "type": {"const": "function"},
        "function": _object({}, {"name": STRING, "arguments": STRING}),
    },
)

CHAT_COMPLETION = _object(
    _HEAD
    | {
        "object": {"const": "chat.completion"},
        "choices": _array(
            _object(
                {
                    "finish_reason": _FINISH_REASON,
                    "index": COUNT,
                    "message": _object(
                        {"role": {"const": "assistant"}, "content": _or_null(STRING), "refusal": _or_null(STRING)},
                        {"tool_calls": _array(_TOOL_CALL) | {"minItems": 1}},
                    ),
                    "logprobs": _or_null(_CHAT_LOGPROBS),
                },
                _CHOICE_EXTENSIONS,
            )
        ),
    },
    _OPTIONAL_HEAD | {"usage": _USAGE} | _PROMPT_EXTENSIONS,
)

CHAT_COMPLETION_CHUNK = _object(
    _HEAD
    | {
        "object": {"const": "chat.completion.chunk"},
        "choices": _array(
            _object(
                {
                    "delta": _object(
                        {},
                        {
                            "role": {"enum": ["developer", "system", "user", "assistant", "tool"]},
                            "content": _or_null(STRING),
                            "refusal": _or_null(STRING),
                            "tool_calls": _array(_TOOL_CALL_CHUNK) | {"minItems": 1},
                        },
                    ),
                    "finish_reason": _or_null(_FINISH_REASON),
                    "index": COUNT,
                },
                {"logprobs": _or_null(_CHAT_LOGPROBS)} | _CHOICE_EXTENSIONS,
            )
        ),
    },
    _OPTIONAL_HEAD | {"usage": _or_null(_USAGE)} | _PROMPT_EXTENSIONS,
)

# What OpenAI sends for the first token of an echo is null, though its description knows numbers only.
_COMPLETION_LOGPROBS = _object(
    {},
    {
        "text_offset": _array(COUNT),
        "token_logprobs": _array(_or_null(NUMBER)),
        "tokens": _array(STRING),
        "top_logprobs": _array(_or_null(_map(NUMBER))),
    },
)


def _text_completion(finish_reason: Schema, usage: Schema) -> Schema:
    choice = _object(
        {
            "finish_reason": finish_reason,
            "index": COUNT,
            "logprobs": _or_null(_COMPLETION_LOGPROBS),
            "text": STRING,
        },
        _CHOICE_EXTENSIONS | _PROMPT_EXTENSIONS,
    )
    return _object(
        _HEAD | {"object": {"const": "text_completion"}, "choices": _array(choice)}, _OPTIONAL_HEAD | {"usage": usage}
    )


_COMPLETION_FINISH: Schema = {"enum": ["stop", "length", "content_filter"]}
TEXT_COMPLETION = _text_completion(_COMPLETION_FINISH, _USAGE)
# OpenAI describes streamed and plain text completions as one object, but what it streams has nulls until the end.
TEXT_COMPLETION_CHUNK = _text_completion(_or_null(_COMPLETION_FINISH), _or_null(_USAGE))

ERROR = _object(
    {"error": _object({"message": STRING, "type": STRING, "param": _or_null(STRING), "code": _or_null(STRING)})}
)

SCHEMAS = (CHAT_COMPLETION, CHAT_COMPLETION_CHUNK, TEXT_COMPLETION, TEXT_COMPLETION_CHUNK, ERROR)


def validate(value: Any, schema: Schema) -> None:
    """Raise `jsonschema.ValidationError` where a value is not as a schema says."""
    Draft202012Validator(schema).validate(value)
