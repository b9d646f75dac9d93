"""docs/api.md names every field that there is, and no other."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import TypeAdapter

from engine.sampling_params import MAX_COUNT, SamplingParams
from server import (
    messages_answer,
    messages_protocol,
    protocol,
    response_types,
    responses_answer,
    responses_protocol,
)
from tests.server import test_chat, test_messages, test_responses
from tests.server.launch import user

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
CHAT, COMPLETIONS = "`POST /v1/chat/completions`", "`POST /v1/completions`"
RESPONSE, MESSAGE, COUNT = "`POST /v1/responses`", "`POST /v1/messages`", "`POST /v1/messages/count_tokens`"

REQUESTS: dict[tuple[str, str], Any] = {
    (CHAT, "Request"): protocol.ChatCompletionRequest,
    (COMPLETIONS, "Request"): protocol.CompletionRequest,
    ("`POST /tokenize`", "Request with a text"): protocol.TokenizeTextRequest,
    ("`POST /tokenize`", "Request with messages"): protocol.TokenizeChatRequest,
    ("`POST /detokenize`", "Request"): protocol.DetokenizeRequest,
    (RESPONSE, "Request"): responses_protocol.ResponsesRequest,
    (MESSAGE, "Request"): messages_protocol.MessagesRequest,
    (COUNT, "Request"): messages_protocol.CountTokensRequest,
}
RESPONSES: dict[tuple[str, str], Any] = {
    (CHAT, "Response"): response_types.ChatCompletion,
    (CHAT, "Chunk of a stream"): response_types.ChatCompletionChunk,
    (COMPLETIONS, "Response"): response_types.Completion,
    (COMPLETIONS, "Chunk of a stream"): response_types.CompletionChunk,
    ("`POST /tokenize`", "Response"): response_types.Tokens,
    ("`POST /detokenize`", "Response"): response_types.Text,
    ("`GET /v1/models`", "Response"): response_types.ModelList,
    ("`GET /v1/models/{name}`", "Response"): response_types.Model,
    (RESPONSE, "Response"): responses_answer.ResponseObject,
    ("`DELETE /v1/responses/{name}`", "Response"): responses_answer.DeletedResponse,
    (MESSAGE, "Response"): messages_answer.MessageObject,
    (MESSAGE, "Errors"): messages_answer.MessageErrorResponse,
    (COUNT, "Response"): messages_answer.TokenCount,
    ("Errors", ""): response_types.ErrorResponse,
}
EVENTS: dict[tuple[str, str], tuple[Any, set[str]]] = {
    (RESPONSE, "Events of a stream"): (responses_answer.ResponseStreamEvent, {"type", "sequence_number"}),
    (MESSAGE, "Events of a stream"): (messages_answer.MessageStreamEvent, {"type"}),
}
"""The types of events, and the fields that all of them have."""
# "0 to 20", "above 0 to 1"
RANGE = re.compile(r"(?P<open>above )?(?P<low>-?\d+) to (?P<high>-?\d+)\b")


def section(place: tuple[str, str]) -> str:
    """The text below a heading and one of its subheadings."""
    text = PAGE
    for level, title in enumerate(place, start=2):
        if title:
            (_, text) = re.split(rf"^{'#' * level} {re.escape(title)}$", text, flags=re.MULTILINE)
            text = re.split(rf"^#{{2,{level}}} ", text, flags=re.MULTILINE)[0]
    return text


def table(place: tuple[str, str]) -> dict[str, list[str]]:
    """The cells of the rows about fields, by field."""
    found: dict[str, list[str]] = {}
    for field, cells in re.findall(r"^\| `([^`]+)` \| (.*) \|$", section(place), flags=re.MULTILINE):
        assert field not in found, f"{field} has two rows"
        found[field] = cells.split(" | ")
    return found


def fields(kind: Any) -> dict[str, bool]:
    """The paths of all keys of a type, with whether they are required."""
    whole = TypeAdapter(kind).json_schema()

    def walk(schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, bool]]:
        if "$ref" in schema:
            schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
        for alternative in [*schema.get("anyOf", []), *schema.get("oneOf", [])]:
            yield from walk(alternative, prefix)
        for name, child in schema.get("properties", {}).items():
            yield prefix + name, name in schema.get("required", [])
            yield from walk(child, f"{prefix}{name}.")
        if "items" in schema:
            yield from walk(schema["items"], f"{prefix[:-1]}[].")
        if isinstance(schema.get("additionalProperties"), dict):
            yield from walk(schema["additionalProperties"], f"{prefix}*.")

    return dict(walk(whole, ""))


@pytest.mark.parametrize("place", [*REQUESTS, *RESPONSES], ids=" ".join)
def test_rows_are_the_fields(place: tuple[str, str]) -> None:
    assert table(place).keys() == fields((REQUESTS | RESPONSES)[place]).keys()


@pytest.mark.parametrize("place", REQUESTS, ids=" ".join)
def test_required_fields_are_said_to_be(place: tuple[str, str]) -> None:
    required = {field for field, needed in fields(REQUESTS[place]).items() if needed}
    assert {field for field, cells in table(place).items() if cells[2] == "required"} == required


@pytest.mark.parametrize("place", EVENTS, ids=" ".join)
def test_rows_are_the_events(place: tuple[str, str]) -> None:
    union, common = EVENTS[place]
    found: dict[str, set[str]] = {}
    for kind in get_args(get_args(union)[0]):
        hints = get_type_hints(kind)
        assert get_origin(hints["type"]) is Literal
        found |= dict.fromkeys(get_args(hints["type"]), hints.keys() - common)
    assert {event: set(re.findall("`([^`]+)`", cells[0])) for event, cells in table(place).items()} == found


def check_ranges(place: tuple[str, str], names: Iterable[str], make: Callable[[str, int], Any]) -> None:
    """The ends of the ranges that rows tell are taken, what lies beyond is not."""
    rows = table(place)
    for name in names:
        found = RANGE.match(rows[name][1])
        assert found is not None, name
        low, high = int(found["low"]), int(found["high"])
        for value in (high, low + 1 if found["open"] else low):
            make(name, value)
        for value in (high + 1, low if found["open"] else low - 1):
            with pytest.raises(ValueError, match=re.escape(name.removeprefix("max_output_"))):
                make(name, value)


def numbers(place: tuple[str, str]) -> list[str]:
    """The fields that hold one number that is not refused."""
    return [n for n, cells in table(place).items() if cells[0] in ("integer", "number") and "refused" not in cells[1]]


@pytest.mark.parametrize("place", list(REQUESTS)[:2], ids=" ".join)
def test_ranges_are_those_that_are_checked(place: tuple[str, str]) -> None:
    def make(name: str, value: int) -> SamplingParams:
        return SamplingParams(**{"max_tokens": None, name: value})  # type: ignore[arg-type]

    ours = protocol.SamplingFields.model_fields.keys() & SamplingParams.__dataclass_fields__.keys()
    found = [name for name in numbers(place) if name in ours]
    assert len(found) > 10
    check_ranges(place, found, make)


def test_ranges_of_responses() -> None:
    def make(name: str, value: int) -> SamplingParams:
        fields: dict[str, Any] = {"input": "Hi", "max_output_tokens": MAX_COUNT, name: value}
        body = responses_protocol.ResponsesRequest(**fields)
        return body.chat([], body.messages()).params({})

    place = (RESPONSE, "Request")
    assert {"max_output_tokens", "temperature", "top_logprobs", "priority"} <= set(numbers(place))
    check_ranges(place, numbers(place), make)


def test_ranges_of_messages() -> None:
    def make(name: str, value: int) -> SamplingParams:
        fields: dict[str, Any] = {"model": "vlm", "max_tokens": 1, "messages": [user("Hi")], name: value}
        return messages_protocol.MessagesRequest(**fields).chat().params({})

    place = (MESSAGE, "Request")
    assert set(numbers(place)) == {"max_tokens", "temperature", "top_p", "top_k"}
    check_ranges(place, numbers(place), make)


NOT_SERVED = {
    CHAT: test_chat.NOT_AVAILABLE,
    RESPONSE: test_responses.NOT_AVAILABLE,
    MESSAGE: test_messages.NOT_SERVED,
    COUNT: test_messages.NOT_SERVED,
}
OLDER = ("guided_", "function_call", "use_beam_search")
"""Names of which those tests ask for some."""
PARTS = ("messages", "input")
"""Of a conversation other things are refused too."""


@pytest.mark.parametrize("endpoint", NOT_SERVED)
def test_what_is_refused_is_said_to_be(endpoint: str) -> None:
    rows = table((endpoint, "Request"))
    asked = {name if name in rows else name.partition(".")[0] for _, name in NOT_SERVED[endpoint]}
    for name in asked - {*PARTS}:
        assert "refused" in " ".join(rows[name]), name
    said = {name for name, cells in rows.items() if "refused" in cells[1] and not name.startswith(PARTS)}
    assert {name for name in said if not name.startswith(OLDER)} <= asked
