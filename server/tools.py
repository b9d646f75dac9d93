"""Tools that a client offers: which of them are to be called, and how an answer tells their calls."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, Field

from engine.grammar.structured_outputs import StructuredOutputs
from server.tool_parsers import JsonCalls, NamedCall, Piece, ToolParser

MAX_TOOLS = 128
_ANYTHING: dict[str, Any] = {"type": "object"}


class ToolModel(BaseModel):
    """As `server.protocol.RequestModel`, which has to know these."""

    model_config = {"strict": True, "extra": "ignore", "allow_inf_nan": False}


class FunctionDefinition(ToolModel):
    """What may be called."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ToolModel):
    """A function; there are no other tools."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(ToolModel):
    """Names a function."""

    name: str


class NamedToolChoice(ToolModel):
    """The one function that is to be called."""

    type: Literal["function"]
    function: FunctionName


class FunctionCall(ToolModel):
    """A call's name, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(ToolModel):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] | None = "function"
    function: FunctionCall


_DATA = ("const", "enum", "default", "examples")
"""Keywords with values that are no schemas."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

Choice = Literal["none", "auto", "required"] | NamedToolChoice


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request's tools are used.

    Args:
        make_parser: takes an answer apart; called for each answer.
        form: that an answer has, where a call is demanded.
        most_calls: of an answer.
        keeps_special_tokens: whether they must stay in the text for the parser to see.
    """

    make_parser: Callable[[], ToolParser]
    form: StructuredOutputs | None = None
    most_calls: int = MAX_TOOLS
    keeps_special_tokens: bool = False


class ToolReader:
    """Takes one answer apart, into what OpenAI's streams tell of a message."""

    def __init__(self, use: ToolUse) -> None:
        self._parser = use.make_parser()
        self._most_calls = use.most_calls
        self._blank: list[str] = []
        """White space that is told only if text follows, or if there is no call."""
        self.num_calls = 0

    def feed(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """The deltas that the next text brings."""
        pieces = self._parser.feed(text)
        if is_last:
            pieces += self._parser.finish()
        deltas = [delta for piece in pieces for delta in self._deltas(piece)]
        blank = "".join(self._blank) if is_last and not self.num_calls else ""
        return [*deltas, {"content": blank}] if blank else deltas

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's, for the engine's."""
        return "tool_calls" if reason == "stop" and self.num_calls else reason

    def _deltas(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if isinstance(piece, str):
            text = piece.rstrip()
            if text:
                yield {"content": "".join([*self._blank, text])}
                self._blank.clear()
            self._blank.append(piece[len(text) :])
        elif piece.index < self._most_calls:
            call: dict[str, Any] = {"index": piece.index, "function": {"arguments": piece.arguments}}
            if piece.name is not None:
                self.num_calls = piece.index + 1
                call = {"index": piece.index, "id": f"call_{uuid4().hex}", "type": "function",
                        "function": {"name": piece.name, "arguments": piece.arguments}}  # fmt: skip
            yield {"tool_calls": [call]}


def joined(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The `content` and, if there are any, `tool_calls` of the message that the deltas make up."""
    content: str | None = None
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if "content" in delta:
            content = (content or "") + delta["content"]
        for call in delta.get("tool_calls", []):
            if "id" in call:
                calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {"content": content, "tool_calls": calls} if calls else {"content": content or ""}


def named_call(tools: list[Tool], name: str) -> ToolUse:
    """Call this one.

    Raises:
        ValueError: there is none of that name.
    """
    for tool in tools:
        if tool.function.name == name:
            return ToolUse(lambda: NamedCall(name), StructuredOutputs(json=_parameters(tool)))
    raise ValueError(f"tool_choice names the function {name[:100]!r}, which is not among the tools")


def some_call(tools: list[Tool], most_calls: int) -> ToolUse:
    """Call at least one, in a list of objects that the answer is."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "parameters": {"$ref": f"#/$defs/{number}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    schema = {
        "type": "array",
        "items": {"anyOf": calls},
        "minItems": 1,
        "maxItems": most_calls,
        "$defs": {str(number): _moved(_parameters(tool), f"#/$defs/{number}") for number, tool in enumerate(tools)},
    }
    return ToolUse(JsonCalls, StructuredOutputs(json=schema), most_calls)


def _parameters(tool: Tool) -> dict[str, Any]:
    given = tool.function.parameters
    if not given:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if given.get("type", "object") != "object":
        raise ValueError(f"tools: the parameters of {tool.function.name!r} must be of the type 'object'")
    return {**_ANYTHING, **given}


def _moved(schema: Any, root: str, *, are_names: bool = False) -> Any:
    """A schema whose references to its own root lead to where that lies now.

    One with an identity of its own is left alone: they are relative to that. `are_names` says that the keys are names
    of properties or definitions, not keywords.
    """
    if isinstance(schema, list):
        return [_moved(value, root) for value in schema]
    if not isinstance(schema, dict) or ("$id" in schema and not are_names):
        return schema
    return {key: value if key in _DATA and not are_names else _moved_value(key, value, root, are_names=are_names)
            for key, value in schema.items()}  # fmt: skip


def _moved_value(key: str, value: Any, root: str, *, are_names: bool) -> Any:
    if key == "$ref" and isinstance(value, str) and not are_names:
        return root + value[1:] if value == "#" or value.startswith("#/") else value
    return _moved(value, root, are_names=key in _NAMED and not are_names)
