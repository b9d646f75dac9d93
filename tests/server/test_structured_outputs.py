"""Answers of a form that clients ask for, over the wire; forms that cannot be had are refused in time."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator
from openai import OpenAI
from pydantic import BaseModel

from tests.server.errors import check_error
from tests.server.launch import Server, data_url, image_part, text_part, user
from tests.server.openai_schema import CHAT_COMPLETION, ERROR, TEXT_COMPLETION, validate
from tests.server.streams import read_events, stream

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["label", "count"],
    "additionalProperties": False,
}
NUMBERS = re.compile(r"-?[0-9]{1,3}(,[0-9]{1,3}){2}")
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "animals", "strict": True, "schema": SCHEMA}}


def is_animals(text: str) -> bool:
    return Draft202012Validator(SCHEMA).is_valid(json.loads(text))


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "response_format": ({"response_format": JSON_SCHEMA}, is_animals),
    "json": ({"structured_outputs": {"json": SCHEMA}}, is_animals),
    "json in text": ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, is_animals),
    "compact": (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        lambda text: is_animals(text) and " " not in text and "\n" not in text,
    ),
    "regex": ({"structured_outputs": {"regex": NUMBERS.pattern}}, NUMBERS.fullmatch),
    "choice": ({"structured_outputs": {"choice": ["a cat", "a dog", "東京"]}}, ["a cat", "a dog", "東京"].__contains__),
    "GBNF": ({"structured_outputs": {"grammar": 'root ::= "<" [a-c]{3} ">"'}}, re.compile("<[a-c]{3}>").fullmatch),
    "Lark": ({"structured_outputs": {"grammar": "start: /[a-c]{3}/"}}, re.compile("[a-c]{3}").fullmatch),
    "beside text": (
        {"response_format": {"type": "text"}, "structured_outputs": {"choice": ["yes"]}}, "yes".__eq__,
    ),
}  # fmt: skip
BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "not": ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs", '"not"'),
    "uniqueItems": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}},
        "response_format", '"uniqueItems"',
    ),
    "if": ({"structured_outputs": {"json": {"if": {}, "then": {}}}}, "structured_outputs", '"if"'),
    "format": ({"structured_outputs": {"json": {"type": "string", "format": "x"}}}, "structured_outputs", "format: x"),
    "regex": ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
    "GBNF": ({"structured_outputs": {"grammar": 'root ::= "a"\n)'}}, "structured_outputs", "line 2"),
    "Lark": ({"structured_outputs": {"grammar": 'start: "a"\nB: ~~'}}, "structured_outputs", "line 2"),
    "ring": ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs", "no answer fits it"),
    "large": ({"structured_outputs": {"json": {"const": "x" * 300_000}}}, "structured_outputs", "at most 262144"),
    "90,000 required": (
        {"structured_outputs": {"json": {"required": [f"a{n}" for n in range(90_000)]}}},
        "structured_outputs", "at most 262144",
    ),
    "deep text": ({"structured_outputs": {"json": "[" * 30_000}}, "structured_outputs", "no valid JSON"),
    "two kinds": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    "no kind": ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    "unknown key": ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
    "no list": ({"structured_outputs": {"choice": "ab"}}, "structured_outputs", "list of strings"),
    "both fields": (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "response_format", "exclude",
    ),
    "unknown type": ({"response_format": {"type": "xml"}}, "response_format", "'xml' is not available"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format", "must be an object"),
    "min_tokens": ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens", "structured_outputs"),
    "bad_words": ({"structured_outputs": {"regex": "a"}, "bad_words": ["a"]}, "bad_words", "structured_outputs"),
}  # fmt: skip


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"messages": [user("What is it?")]} if path == CHAT else {"prompt": "It is"}
    return prompt | {"max_tokens": 100, "temperature": 1.0, "seed": 7} | fields


def texts(path: str, response: dict[str, Any]) -> list[str]:
    choices = response["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * len(choices)
    return [choice["message"]["content"] if path == CHAT else choice["text"] for choice in choices]


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_the_answer_fits(server: Server, path: str, form: str) -> None:
    fields, fits = FORMS[form]
    plain = server.post(path, body(path, n=3, **fields))
    assert plain.status_code == 200, plain.text
    validate(plain.json(), CHAT_COMPLETION if path == CHAT else TEXT_COMPLETION)
    found = texts(path, plain.json())
    assert len(found) == 3 and all(fits(text) for text in found), found
    parts = ["", "", ""]
    for chunk in stream(server, path, body(path, n=3, **fields)):
        choice = chunk["choices"][0]
        parts[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
    assert parts == found


def test_any_object(server: Server) -> None:
    """A random model closes none by itself."""
    found = server.post(CHAT, body(CHAT, response_format={"type": "json_object"}, n=4, stop=":")).json()["choices"]
    assert all(re.fullmatch(r'\{\s*(\}|".*)?', choice["message"]["content"], re.DOTALL) for choice in found)


def test_about_a_picture_with_logprobs(server: Server, photo_files: list[Path]) -> None:
    said = [user(text_part("What is this?"), image_part(data_url(photo_files[0])))]
    fields = {"messages": said, "logprobs": True, "top_logprobs": 2, "response_format": JSON_SCHEMA, "n": 2}
    for choice in server.post(CHAT, body(CHAT, **fields)).json()["choices"]:
        assert is_animals(choice["message"]["content"])
        assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == choice["message"]["content"]


@BOTH
@pytest.mark.parametrize("case", REFUSED)
def test_refused(server: Server, path: str, case: str) -> None:
    fields, param, words = REFUSED[case]
    check_error(server.post(path, body(path, **fields)), param, words)


HOSTILE: dict[str, Any] = {
    "multipleOf": {"type": "integer", "multipleOf": 99_999_989},
    "allOf": {"type": "string", "allOf": [{"pattern": f"a.{{{n}}}b"} for n in range(30)]},
    "required": {"type": "object", "required": [f"a{n}" for n in range(20_000)]},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_schemas_harm_nobody(server: Server, case: str) -> None:
    known = {"structured_outputs": {"choice": ["known"]}}
    assert texts(CHAT, server.post(CHAT, body(CHAT, **known)).json()) == ["known"]
    found: list[Any] = []

    def ask() -> None:
        begun = time.monotonic()
        response = server.post(CHAT, body(CHAT, structured_outputs={"json": HOSTILE[case]}))
        found.extend((response, time.monotonic() - begun))

    asking = threading.Thread(target=ask)
    asking.start()
    slowest, answered = 0.0, 0
    while asking.is_alive():
        begun = time.monotonic()
        plain = server.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 2})
        formed = server.post(CHAT, body(CHAT, **known))
        assert (plain.status_code, formed.status_code, server.get("/health").status_code) == (200, 200, 200)
        slowest, answered = max(slowest, time.monotonic() - begun), answered + 1
    asking.join()
    response, seconds = found
    check_error(response, "structured_outputs", "it takes more than 2 s to compile")
    assert answered > 3 and slowest < 1.5 and seconds < 8
    fresh = {"structured_outputs": {"choice": [f"after {case}"]}}
    assert texts(CHAT, server.post(CHAT, body(CHAT, **fresh)).json()) == [f"after {case}"]


def test_chains_and_laughs_are_no_danger(server: Server) -> None:
    links = {f"a{n}": {"type": "array", "maxItems": 0, "items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(2000)}
    chain = {"$defs": {**links, "a2000": {"type": "integer"}}, "$ref": "#/$defs/a0"}
    text = {"type": "string", "maxLength": 1}
    laughs = {f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{n - 1}"}] * 10} for n in range(1, 12)}
    for schema in (chain, {"$defs": {"l0": text, **laughs}, "$ref": "#/$defs/l11"}):
        response = server.post(CHAT, body(CHAT, structured_outputs={"json": schema}))
        assert response.status_code == 200, response.text
        json.loads(texts(CHAT, response.json())[0])


@BOTH
def test_a_grammar_that_fails_while_generating(server: Server, path: str) -> None:
    """It compiles, but becomes too much for the library's limits after some tokens."""
    fields = {"structured_outputs": {"regex": "(.{1,1000}){1,1000}"}}
    error = server.post(path, body(path, **fields))
    message = "structured_outputs: the grammar became too complex"
    check_error(error, "structured_outputs", message)
    *_, last = read_events(server.post(path, body(path, stream=True, **fields)).text)
    validate(last, ERROR)
    assert (last["error"]["message"], last["error"]["param"]) == (message, "structured_outputs")
    assert texts(path, server.post(path, body(path, **FORMS["regex"][0])).json())


class Animals(BaseModel):
    """What the client's helpers parse answers to."""

    label: Literal["cat", "dog"]
    sizes: list[Literal[1, 2, 3]]
    note: Literal["none"] | None = None


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_the_clients_parse(client: OpenAI) -> None:
    completion = client.chat.completions.parse(
        model="vlm", messages=[{"role": "user", "content": "What is it?"}], response_format=Animals, max_tokens=300,
        extra_body={"logit_bias": {}}, temperature=3, seed=5,
    )  # fmt: skip
    assert isinstance(completion.choices[0].message.parsed, Animals)


def test_the_clients_stream(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="vlm", messages=[{"role": "user", "content": "What is it?"}], response_format=Animals, max_tokens=300,
        temperature=3, seed=5,
    ) as events:  # fmt: skip
        kinds = {event.type for event in events}
        parsed = events.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Animals) and "content.delta" in kinds


def test_the_clients_responses(client: OpenAI) -> None:
    response = client.responses.parse(
        model="vlm", input="What is it?", text_format=Animals, max_output_tokens=300, temperature=3
    )
    assert isinstance(response.output_parsed, Animals)
    assert response.text is not None and response.text.format is not None and response.text.format.type == "json_schema"


def test_responses(server: Server) -> None:
    said = {"input": "What is it?", "max_output_tokens": 100}
    wanted = {"type": "json_schema", "name": "animals", "schema": SCHEMA, "strict": True}
    found = server.post(RESPONSES, {**said, "text": {"format": wanted}}).json()
    assert is_animals(found["output"][0]["content"][0]["text"]) and found["text"]["format"] == wanted
    bad = {"type": "json_schema", "name": "x", "schema": {"not": {}}}
    check_error(server.post(RESPONSES, {**said, "text": {"format": bad}}), "text.format", '"not"')
    check_error(server.post(RESPONSES, {**said, "text": {"format": {"type": "xml"}}}), "text.format", "json_schema")
    check_error(
        server.post(RESPONSES, {**said, "structured_outputs": {"regex": "("}}), "structured_outputs", "unclosed"
    )
    none = {"type": "json_schema", "name": "x", "schema": 5}
    check_error(server.post(RESPONSES, {**said, "text": {"format": none}}), "text.format", "schema")
    older = {"response_format": {"type": "json_schema", "json_schema": {"name": "animals", "schema": SCHEMA}}}
    found = server.post(RESPONSES, {**said, **older}).json()
    assert found["text"]["format"] == {"type": "json_schema", "name": "animals", "schema": SCHEMA}
    both = server.post(RESPONSES, {**said, **older, "text": {"format": wanted}})
    check_error(both, "response_format", "text.format")


def test_the_client_is_told(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        client.chat.completions.create(
            model="vlm", messages=[{"role": "user", "content": "Hi"}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}},
        )  # fmt: skip


def test_many_at_once_beside_plain_ones(server: Server) -> None:
    """New grammars for each, while plain answers stay what they are."""
    plain = body(COMPLETIONS, temperature=0, max_tokens=30)
    wanted = server.post(COMPLETIONS, plain).json()["choices"][0]["text"]
    found: list[str] = []

    def ask(number: int) -> None:
        fields = {"structured_outputs": {"regex": f"{number}[a-z]{{3}}"}}
        found.extend(texts(COMPLETIONS, server.post(COMPLETIONS, body(COMPLETIONS, **fields)).json()))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    assert server.post(COMPLETIONS, plain).json()["choices"][0]["text"] == wanted
    for thread in threads:
        thread.join()
    assert sorted(int(text[:-3]) for text in found) == list(range(12))


def test_a_client_that_leaves_while_its_grammar_is_checked(server: Server) -> None:
    slow = {"type": "integer", "multipleOf": 99_999_971}  # not asked before, or it would be known
    with server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=body(CHAT, structured_outputs={"json": slow}), timeout=0.5)
    fresh = {"structured_outputs": {"choice": ["after it left"]}}
    assert texts(CHAT, server.post(CHAT, body(CHAT, **fresh)).json()) == ["after it left"]
