"""Responses and chunks are OpenAI's objects: by its description, and as its own client parses them."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec
from tests.server.launch import Launch, Server, data_url, image_part, text_part, user
from tests.server.openai_schema import (
    CHAT_COMPLETION,
    CHAT_COMPLETION_CHUNK,
    ERROR,
    SCHEMAS,
    TEXT_COMPLETION,
    TEXT_COMPLETION_CHUNK,
    validate,
)
from tests.server.streams import read_events, stream

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USAGE: dict[str, Any] = {"include_usage": True}
IMAGE = "<image here>"
"""Stands for a photograph in the requests below."""

CHATS: list[dict[str, Any]] = [
    {},
    {"n": 3, "temperature": 1, "seed": 1},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 5, "n": 2, "temperature": 2, "seed": 3, "max_tokens": 40},
    {"stop": ["e", "a"], "logprobs": True},
    {"stop": "e", "include_stop_str_in_output": True},
    {"stop_token_ids": list(range(300, 600))},
    {"return_token_ids": True, "n": 2},
    {"messages": [user(IMAGE, text_part("What is this?"), IMAGE)], "logprobs": True, "top_logprobs": 1},
]
TEXTS: list[dict[str, Any]] = [
    {},
    {"prompt": ["Hello", "Once upon"], "n": 2, "temperature": 1, "seed": 1},
    {"logprobs": 0},
    {"logprobs": 3, "temperature": 3, "seed": 3, "max_tokens": 40},
    {"stop": ["e", "a"], "logprobs": 1},
    {"stop": "e", "include_stop_str_in_output": True},
    {"echo": True, "return_token_ids": True},
    {"stop_token_ids": list(range(300, 600))},
]


def shown(value: Any) -> str:
    return json.dumps(value)[:60]


@pytest.fixture(scope="module")
def photo(photo_files: list[Path]) -> dict[str, Any]:
    return image_part(data_url(photo_files[0]))


def chat_body(fields: dict[str, Any], photo: dict[str, Any]) -> dict[str, Any]:
    body = {"messages": [user("Tell me a story.")], "temperature": 0, "max_tokens": 12} | fields
    body["messages"] = json.loads(json.dumps(body["messages"]).replace(json.dumps(IMAGE), json.dumps(photo)))
    return body


def text_body(fields: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "Several plates of food", "temperature": 0, "max_tokens": 12} | fields


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas_are_schemas(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)


def test_schemas_refuse_keys_that_nobody_documented(server: Server, photo: dict[str, Any]) -> None:
    response = server.post(CHAT, chat_body({"logprobs": True, "top_logprobs": 1}, photo)).json()
    choice = response["choices"][0]
    places = [response, response["usage"], choice, choice["message"], choice["logprobs"]["content"][0]]
    for place in places:
        place["another_key"] = None
        with pytest.raises(ValidationError):
            validate(response, CHAT_COMPLETION)
        del place["another_key"]
    validate(response, CHAT_COMPLETION)


@pytest.mark.parametrize("fields", [*CHATS, {"prompt_logprobs": 2, "return_token_ids": True}], ids=shown)
def test_chat_completions(server: Server, photo: dict[str, Any], fields: dict[str, Any]) -> None:
    response = server.post(CHAT, chat_body(fields, photo))
    validate(response.json(), CHAT_COMPLETION)
    parsed = ChatCompletion.model_validate(response.json(), strict=True)
    assert ChatCompletion.model_validate_json(response.content, strict=True) == parsed
    assert [choice.index for choice in parsed.choices] == list(range(fields.get("n", 1)))


@pytest.mark.parametrize("options", [None, USAGE, USAGE | {"continuous_usage_stats": True}], ids=shown)
@pytest.mark.parametrize("fields", CHATS, ids=shown)
def test_chat_chunks(server: Server, photo: dict[str, Any], fields: dict[str, Any], options: Any) -> None:
    chunks = stream(server, CHAT, chat_body(fields, photo) | {"stream_options": options})
    assert chunks
    for chunk in chunks:
        validate(chunk, CHAT_COMPLETION_CHUNK)
        ChatCompletionChunk.model_validate(chunk, strict=True)


@pytest.mark.parametrize("fields", [*TEXTS, {"prompt_logprobs": 2, "n": 2}], ids=shown)
def test_text_completions(server: Server, fields: dict[str, Any]) -> None:
    response = server.post(COMPLETIONS, text_body(fields))
    validate(response.json(), TEXT_COMPLETION)
    parsed = Completion.model_validate(response.json(), strict=True)
    assert Completion.model_validate_json(response.content, strict=True) == parsed


def test_echo_with_logprobs(server: Server) -> None:
    response = server.post(COMPLETIONS, text_body({"echo": True, "logprobs": 2})).json()
    validate(response, TEXT_COMPLETION)
    assert response["choices"][0]["logprobs"]["token_logprobs"][0] is None


@pytest.mark.parametrize("options", [None, USAGE, USAGE | {"continuous_usage_stats": True}], ids=shown)
@pytest.mark.parametrize("fields", TEXTS, ids=shown)
def test_text_chunks(server: Server, fields: dict[str, Any], options: Any) -> None:
    chunks = stream(server, COMPLETIONS, text_body(fields) | {"stream_options": options})
    assert chunks
    for chunk in chunks:
        validate(chunk, TEXT_COMPLETION_CHUNK)
        for choice in chunk["choices"]:  # the client's type is that of whole answers, which have a reason
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        Completion.model_validate(chunk, strict=True)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_error_inside_a_stream(launch: Launch, checkpoint: MakeCheckpoint, path: str) -> None:
    """The server goes down while it answers."""
    server = launch(checkpoint(CheckpointSpec(max_position_embeddings=16384)), "--shutdown-timeout", "0.2")
    body = {"messages": [user("Hi")], "prompt": "Hi", "stream": True, "max_tokens": 16000, "ignore_eos": True}
    received: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with server.client() as client, client.stream("POST", path, json=body) as response:
            for text in response.iter_text():
                received.append(text)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    server.stop()
    reader.join()
    *chunks, error = read_events("".join(received))
    validate(error, ERROR)
    assert chunks
    for chunk in chunks:
        validate(chunk, CHAT_COMPLETION_CHUNK if path == CHAT else TEXT_COMPLETION_CHUNK)
