"""Tools: calls that are demanded are made, calls that a model makes are found, and neither is lost in a stream."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI, pydantic_function_tool
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, Field

from engine.args import EngineArgs
from engine.chat_template import ChatTemplate
from engine.config import create_config
from engine.input_processor import load_tokenizer
from server.tool_parsers import PARSERS
from server.tools import FunctionDefinition, Tool, ToolReader, ToolUse, _moved, joined, named_call, some_call
from tests.conftest import MakeCheckpoint
from tests.engine.grammar.accepting import accepts
from tests.server.errors import check_error
from tests.server.launch import Launch, Server, user
from tests.server.openai_schema import CHAT_COMPLETION, CHAT_COMPLETION_CHUNK, validate
from tests.server.streams import stream

CHAT = "/v1/chat/completions"
TEMPLATE = Path(__file__).parents[1] / "templates" / "chatml_tools.jinja"
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two digits.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/$defs/n"}},
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"n": DIGIT},
        },
    },
}
PAINT = {
    "type": "function",
    "function": {
        "name": "paint-it",
        "parameters": {
            "type": "object",
            "properties": {"color": {"$ref": "#/$defs/n"}},
            "required": ["color"],
            "additionalProperties": False,
            "$defs": {"n": {"enum": ["red", "blue"]}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [ADD, PAINT, NOW]


def tools(*given: dict[str, Any]) -> list[Tool]:
    return [Tool.model_validate(tool) for tool in given]


def body(**fields: Any) -> dict[str, Any]:
    said = {"messages": [user("What is 1 + 2?")], "tools": TOOLS, "max_tokens": 200, "temperature": 1.5, "seed": 3}
    return said | fields


def check_calls(calls: list[dict[str, Any]]) -> list[str]:
    """Each is of one of the tools, and fits it; their names."""
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        match call["function"]["name"]:
            case "add":
                assert arguments.keys() == {"a", "b"} and all(0 <= value <= 9 for value in arguments.values())
            case "paint-it":
                assert arguments["color"] in ("red", "blue") and len(arguments) == 1
            case "now":
                assert arguments == {}
            case other:
                raise AssertionError(other)
    return [call["function"]["name"] for call in calls]


def both(server: Server, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a plain answer, after a look that the stream joins to the same."""
    response = server.post(CHAT, asked)
    assert response.status_code == 200, response.text
    validate(response.json(), CHAT_COMPLETION)
    ChatCompletion.model_validate(response.json(), strict=True)
    choices: list[dict[str, Any]] = response.json()["choices"]
    chunks = stream(server, CHAT, asked)
    for chunk in chunks:
        validate(chunk, CHAT_COMPLETION_CHUNK)
        ChatCompletionChunk.model_validate(chunk, strict=True)
    for choice in choices:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        streamed = joined(part["delta"] for part in parts)
        assert without_ids(streamed) == without_ids(choice["message"])
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    return choices


def without_ids(message: dict[str, Any]) -> Any:
    return message["content"] or None, [call["function"] for call in message.get("tool_calls", [])]


@pytest.fixture(scope="module")
def server(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    """Its prompts are not cached, so that the same request gets the same tokens each time."""
    return launch(
        checkpoint(), "--served-model-name", "vlm", "--tool-call-parser", "hermes", "--chat-template", str(TEMPLATE),
        "--no-enable-prefix-caching",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["add", "paint-it", "now"])
def test_a_named_function_is_called(server: Server, name: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    for found in both(server, body(tool_choice=choice, n=3)):
        assert found["finish_reason"] == "tool_calls" and found["message"]["content"] is None
        assert check_calls(found["message"]["tool_calls"]) == [name]


def test_required_calls(server: Server) -> None:
    named = set()
    for seed in range(4):
        for found in both(server, body(tool_choice="required", n=4, seed=seed, logit_bias=closing(server))):
            if found["finish_reason"] == "tool_calls":
                named |= set(check_calls(found["message"]["tool_calls"]))
                assert found["message"]["content"] is None
    assert named == {"add", "paint-it", "now"}


def test_one_call_where_parallel_ones_are_not_wanted(server: Server) -> None:
    for found in both(server, body(tool_choice="required", parallel_tool_calls=False, n=4)):
        assert found["finish_reason"] == "tool_calls"
        assert len(check_calls(found["message"]["tool_calls"])) == 1


def closing(server: Server) -> dict[str, float]:
    """A bias to what ends lists."""
    return {str(server.post("/tokenize", {"prompt": "]", "add_special_tokens": False}).json()["tokens"][-1]): 5.0}


def test_a_call_that_was_cut(server: Server) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    found = both(server, body(tool_choice=choice, max_tokens=3))[0]
    assert found["finish_reason"] == "length" and found["message"]["tool_calls"][0]["function"]["name"] == "add"


def test_logprobs_and_ids_beside_calls(server: Server) -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    asked = body(tool_choice=choice, logprobs=True, return_token_ids=True)
    plain = server.post(CHAT, asked).json()["choices"][0]
    parts = [chunk["choices"][0] for chunk in stream(server, CHAT, asked)]
    assert [token for part in parts for token in part.get("token_ids", [])] == plain["token_ids"]
    entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
    assert len(entries) == len(plain["logprobs"]["content"]) == len(plain["token_ids"])


def test_text_is_text_where_the_model_may_choose(server: Server) -> None:
    for choice in (None, "auto"):
        for found in both(server, body(tool_choice=choice, temperature=0, max_tokens=20)):
            assert "tool_calls" not in found["message"] and found["message"]["content"]
            assert found["finish_reason"] in ("stop", "length")


def test_calls_that_the_model_makes(server: Server) -> None:
    """A grammar has the random model speak hermes."""
    call = '"<tool_call>" NL "{\\"name\\": \\"add\\", \\"arguments\\": {\\"a\\": " D ", \\"b\\": " D "}}" NL'
    grammar = f'start: "Well. " ({call} "</tool_call>"){{2}}\nD: /[0-9]/\nNL: /\\n/'
    for found in both(server, body(structured_outputs={"grammar": grammar}, n=2)):
        assert found["message"]["content"] == "Well." and found["finish_reason"] == "tool_calls"
        assert check_calls(found["message"]["tool_calls"]) == ["add", "add"]
    found = both(server, body(structured_outputs={"grammar": grammar}, parallel_tool_calls=False))[0]
    assert check_calls(found["message"]["tool_calls"]) == ["add"]
    found = both(server, body(structured_outputs={"grammar": grammar}, tool_choice="none"))[0]
    assert "</tool_call>" in found["message"]["content"] and found["finish_reason"] == "stop"


MADE: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}],
}
TOLD = {"role": "tool", "tool_call_id": "call_1", "content": "3"}


def test_calls_and_their_results_are_in_the_prompt(server: Server) -> None:
    said = [user("What is 1 + 2?"), MADE, TOLD]
    prompt = prompt_of(server, messages=said, tools=TOOLS)
    assert "<|im_start|>system\n# Tools\n" in prompt and '"paint-it"' in prompt
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>' in prompt
    assert "<|im_start|>tool call_1\n3<|im_end|>" in prompt
    assert "# Tools" not in prompt_of(server, messages=said)
    answer = server.post(CHAT, body(messages=said, return_token_ids=True, max_tokens=2)).json()
    tokens = server.post("/tokenize", {"messages": said, "tools": TOOLS}).json()["tokens"]
    assert answer["prompt_token_ids"] == tokens
    answer = server.post(CHAT, body(messages=said, return_token_ids=True, max_tokens=2, tool_choice="none")).json()
    assert answer["prompt_token_ids"] == server.post("/tokenize", {"messages": said}).json()["tokens"]


def prompt_of(server: Server, **fields: Any) -> str:
    tokens = server.post("/tokenize", fields).json()["tokens"]
    return str(server.post("/detokenize", {"tokens": tokens}).json()["prompt"])


@pytest.fixture(scope="module")
def template(checkpoint: MakeCheckpoint) -> ChatTemplate:
    """The checkpoint's own, which has no place for tools."""
    tokenizer = load_tokenizer(create_config(EngineArgs(model=str(checkpoint()), device="cpu")))
    return ChatTemplate(tokenizer, tokenizer.chat_template, "<image>")


@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be brief."}], None])
def test_templates_without_a_place_for_tools(template: ChatTemplate, content: Any) -> None:
    system = [] if content is None else [{"role": "system", "content": content}]
    prompt = template.render([*system, {"role": "user", "content": "Hi"}], tools=TOOLS)
    assert prompt.startswith("Be brief." if system else "These functions can be called:\n")
    assert json.dumps(PAINT["function"]) in prompt and prompt.index("can be called") < prompt.index("USER: Hi")
    assert "can be called" not in template.render([{"role": "user", "content": "Hi"}], tools=None)


ERRORS: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no tools": ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
    "none named": (
        {"tools": None, "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice", "no tools",
    ),
    "unknown name": ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "'sub'"),
    "unknown choice": ({"tool_choice": "maybe"}, "tool_choice", "required"),
    "twice": ({"tools": [ADD, ADD]}, "tools", "'add' twice"),
    "bad name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
    "no function": ({"tools": [{"type": "retrieval"}]}, "tools.0.type", "function"),
    "too many": ({"tools": [NOW] * 129}, "tools", "128"),
    "bad schema": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
         "tool_choice": "required"},
        "tools", '"not"',
    ),
    "form and call": (
        {"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "excludes",
    ),
    "form and choice": ({"response_format": {"type": "json_object"}}, "response_format", "no room for calls"),
    "parameters that are no object": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
         "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tools", "type 'object'",
    ),
    "bad arguments": (
        {"messages": [user("Hi"), {**MADE, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, TOLD]},
        "messages", "JSON object",
    ),
    "arguments that are a list": (
        {"messages": [user("Hi"), {**MADE, "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}, TOLD]},
        "messages", "JSON object",
    ),
    "a user without content": ({"messages": [{"role": "user"}]}, "messages", "has no content"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes(server: Server, case: str) -> None:
    fields, param, words = ERRORS[case]
    check_error(server.post(CHAT, body(**fields)), param, words)


def test_tools_without_a_parser(launch: Launch, checkpoint: MakeCheckpoint) -> None:
    server = launch(checkpoint(), "--served-model-name", "vlm")
    for choice in (None, "auto"):
        check_error(server.post(CHAT, body(tool_choice=choice)), "tool_choice", "--tool-call-parser")
    assert server.post(CHAT, body(tool_choice="none", max_tokens=2)).status_code == 200
    found = both(server, body(tool_choice={"type": "function", "function": {"name": "add"}}))[0]
    assert check_calls(found["message"]["tool_calls"]) == ["add"]


class GetSize(BaseModel):
    """A function as the client's helpers describe it."""

    of: list[str] = Field(max_length=0)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client()) as made:
        yield made


def test_the_clients_parse(client: OpenAI) -> None:
    completion = client.chat.completions.parse(
        model="vlm", messages=[{"role": "user", "content": "How large?"}], tools=[pydantic_function_tool(GetSize)],
        tool_choice="required", parallel_tool_calls=False, max_tokens=200,
    )  # fmt: skip
    calls = completion.choices[0].message.tool_calls
    assert calls is not None and calls[0].function.parsed_arguments == GetSize(of=[])


def test_each_tools_references_are_its_own() -> None:
    """Both define `n`, and one refers to its root."""
    tree = {"type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False}
    use = some_call(tools(ADD, PAINT, {"type": "function", "function": {"name": "tree", "parameters": tree}}), 2)
    assert use.form is not None
    for call in (
        '{"name": "add", "parameters": {"a": 1, "b": 2}}', '{"name": "paint-it", "parameters": {"color": "red"}}',
        '{"name": "tree", "parameters": {"child": {"child": {}}}}',
    ):  # fmt: skip
        assert accepts(use.form, f"[{call}]") and accepts(use.form, f"[{call}, {call}]")
        assert not accepts(use.form, f"[{call}, {call}, {call}]") and not accepts(use.form, call)
    for call in (
        '{"name": "add", "parameters": {"a": "red", "b": 2}}', '{"name": "paint-it", "parameters": {"color": 1}}',
        '{"name": "tree", "parameters": {"child": []}}', '{"name": "sub", "parameters": {}}', '{"name": "add"}',
    ):  # fmt: skip
        assert not accepts(use.form, f"[{call}]")
    assert not accepts(use.form, "[]")


def test_a_named_call_takes_the_function_of_that_name() -> None:
    use = named_call(tools(ADD, PAINT), "paint-it")
    assert use.form is not None and accepts(use.form, '{"color": "blue"}') and not accepts(use.form, '{"a": 1, "b": 2}')
    with pytest.raises(ValueError, match="tool_choice names the function 'sub', which is not among the tools"):
        named_call(tools(ADD), "sub")


def test_blank_text_beside_calls_is_left_out() -> None:
    use = ToolUse(PARSERS["hermes"])
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert joined(ToolReader(use).feed(f" \n{call}\n{call}\n", is_last=True))["content"] is None
    assert joined(ToolReader(use).feed(f" a \n{call}", is_last=True))["content"] == " a"
    assert joined(ToolReader(use).feed(" \n", is_last=True)) == {"content": " \n"}
    assert joined(ToolReader(use).feed("", is_last=True)) == {"content": ""}


def test_finish_reasons() -> None:
    reader = ToolReader(ToolUse(PARSERS["hermes"]))
    assert [reader.finish_reason(reason) for reason in ("stop", "length", None)] == ["stop", "length", None]
    reader.feed('<tool_call>{"name": "f"}', is_last=True)
    assert [reader.finish_reason(reason) for reason in ("stop", "length", None)] == ["tool_calls", "length", None]


def test_definitions() -> None:
    with pytest.raises(ValueError, match="pattern"):
        FunctionDefinition(name="a" * 65)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.sampled_from([" ", "\n", "a", "b c", '<tool_call>{"name": "f", "arguments": {}}</tool_call>'])),
    cuts=st.lists(st.integers(0, 100), max_size=8),
)
def test_pieces_join_to_the_whole(parts: list[str], cuts: list[int]) -> None:
    use, text = ToolUse(PARSERS["hermes"]), "".join(parts)
    whole = joined(ToolReader(use).feed(text, is_last=True))
    reader, places = ToolReader(use), sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in pairwise(places)]
    found = [delta for piece in pieces for delta in reader.feed(piece, is_last=False)]
    assert without_ids(joined(found + reader.feed("", is_last=True))) == without_ids(whole)


def test_schemas_are_moved_whole() -> None:
    """References to a schema's own root follow it; values that only look like references stay, and so do names."""
    inner = {"type": "object", "properties": {"a": {"$ref": "#/$defs/q"}}}
    schema = {
        "properties": {
            "self": {"$ref": "#"}, "const": {"$ref": "#/$defs/q"}, "anchored": {"$ref": "#z"},
            "data": {"const": {"$ref": "#/x"}, "default": {"$ref": "#"}, "enum": [{"$ref": "#/y"}]},
            "own": {"$id": "http://x/", **inner}, "$ref": {"$ref": "#/$defs/$ref"}, "$id": {"$ref": "#"},
        },
        "anyOf": [{"$ref": "#/$defs/q"}],
        "$defs": {"q": {"$anchor": "z"}, "$ref": {}},
    }  # fmt: skip
    moved = _moved(schema, "#/$defs/0")
    properties = moved["properties"]
    assert properties["self"] == properties["$id"] == {"$ref": "#/$defs/0"}
    assert properties["const"] == moved["anyOf"][0] == {"$ref": "#/$defs/0/$defs/q"}
    assert properties["$ref"] == {"$ref": "#/$defs/0/$defs/$ref"}
    for name in ("anchored", "data", "own"):
        assert properties[name] == schema["properties"][name]  # type: ignore[index]
    assert moved["$defs"] == schema["$defs"]
