"""docs/api.md names every field that there is, and no other."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from engine.sampling_params import SamplingParams
from server import protocol, response_types
from tests.server.test_chat import NOT_AVAILABLE

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
CHAT, COMPLETIONS = "`POST /v1/chat/completions`", "`POST /v1/completions`"

REQUESTS: dict[tuple[str, str], Any] = {
    (CHAT, "Request"): protocol.ChatCompletionRequest,
    (COMPLETIONS, "Request"): protocol.CompletionRequest,
    ("`POST /tokenize`", "Request with a text"): protocol.TokenizeTextRequest,
    ("`POST /tokenize`", "Request with messages"): protocol.TokenizeChatRequest,
    ("`POST /detokenize`", "Request"): protocol.DetokenizeRequest,
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
    ("Errors", ""): response_types.ErrorResponse,
}
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


@pytest.mark.parametrize("place", list(REQUESTS)[:2], ids=" ".join)
def test_ranges_are_those_that_are_checked(place: tuple[str, str]) -> None:
    rows = table(place)
    ours = [name for name in protocol.SamplingFields.model_fields if name in SamplingParams.__dataclass_fields__]
    numbers = [name for name in ours if rows[name][0] in ("integer", "number")]
    assert len(numbers) > 10
    for name in numbers:
        found = RANGE.match(rows[name][1])
        assert found is not None, name
        low, high = int(found["low"]), int(found["high"])
        others = {"max_tokens": None} if name != "max_tokens" else {}
        for value in (high, low + 1 if found["open"] else low):
            SamplingParams(**others, **{name: value})  # type: ignore[arg-type]
        for value in (high + 1, low if found["open"] else low - 1):
            with pytest.raises(ValueError, match=name):
                SamplingParams(**others, **{name: value})  # type: ignore[arg-type]


def test_what_is_refused_is_said_to_be() -> None:
    rows = table((CHAT, "Request"))
    for asked, name in NOT_AVAILABLE:
        if name != "messages":
            assert "refused" in " ".join(rows[name]), asked
    said = {name for name, cells in rows.items() if "refused" in cells[1] and not name.startswith("messages")}
    older = {name for name in said if name.startswith("guided_")} | {"function_call"}
    assert said - older <= {name for _, name in NOT_AVAILABLE}
