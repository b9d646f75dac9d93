"""From the text that a model writes to the calls of tools in it, as it comes."""

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

_ARGUMENTS = ("arguments", "parameters")
_MOST_CALLS = 128


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What comes new of one call: its name first, then its arguments, JSON in pieces."""

    index: int
    name: str | None
    arguments: str


Piece = str | CallDelta
"""Text that is no part of a call, or what comes new of one."""


class ToolParser(Protocol):
    """Takes an answer apart."""

    def feed(self, text: str) -> list[Piece]:
        """What the next text brings."""

    def finish(self) -> list[Piece]:
        """What was held back, once the answer is complete."""


class NamedCall:
    """All of the answer is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Piece]:
        """See `ToolParser`."""
        name, self._name = self._name, None
        return [CallDelta(0, name, text)] if text or name else []

    def finish(self) -> list[Piece]:
        """See `ToolParser`."""
        return []


class JsonCalls:
    """Objects of a name and arguments, alone, in a list or one after the other.

    Args:
        opening: what stands before the calls; without one an answer that does not begin with a call has none.
        closing: what stands behind each of them, if anything; text may follow.
    """

    def __init__(self, opening: str = "", closing: str = "") -> None:
        self._opening = opening
        self._closing = closing
        self._waiting = ""
        """Text that may become part of a mark."""
        self._is_open = False
        self._is_text = False
        self._call: _Call | None = None
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """See `ToolParser`."""
        self._waiting += text
        return _joined(self._pieces())

    def finish(self) -> list[Piece]:
        """See `ToolParser`."""
        rest, self._waiting = self._waiting, ""
        if self._call is not None and not self._call.is_told:
            rest = self._call.text + rest  # it never became a call
        elif self._num_calls:
            return []
        return [rest] if rest else []

    def _pieces(self) -> Iterator[Piece]:
        progress = True
        while progress and self._waiting:
            before = len(self._waiting), self._is_open, self._call
            if self._call is not None:
                yield from self._inside()
            elif self._is_open:
                self._between()
            elif self._is_text or self._opening:
                yield from self._outside()
            else:
                self._begin()
            progress = (len(self._waiting), self._is_open, self._call) != before

    def _begin(self) -> None:
        """Without a mark, the first character tells whether there are calls."""
        first = self._waiting.lstrip()[:1]
        if first:
            self._is_open, self._is_text = first in "[{", first not in "[{"

    def _outside(self) -> Iterator[Piece]:
        """Text, up to the mark behind which calls stand."""
        if self._is_text and not self._opening:
            text, self._waiting = self._waiting, ""
            yield text
            return
        text, mark, rest = self._waiting.partition(self._opening)
        if mark:
            self._waiting, self._is_open = rest, True
        else:
            kept = _begun_at_the_end(text, self._opening)
            text, self._waiting = text[: len(text) - kept], text[len(text) - kept :]
        if text:
            yield text

    def _between(self) -> None:
        """What is neither call nor text: brackets, commas, and the mark behind a call."""
        if self._closing and self._waiting.startswith(self._closing):
            self._waiting, self._is_open = self._waiting.removeprefix(self._closing), False
        elif self._waiting[0] == "{" and self._num_calls < _MOST_CALLS:
            self._call = _Call(self._num_calls)
        elif not (self._closing and self._closing.startswith(self._waiting)):
            self._waiting = self._waiting[1:]

    def _inside(self) -> Iterator[Piece]:
        assert self._call is not None
        call, text = self._call, self._waiting
        used = call.feed(text)
        self._waiting = text[used:]
        delta = call.take()
        if delta is not None:
            self._num_calls = call.index + 1
            yield delta
        if call.is_complete:
            self._call = None
            if not call.is_told:
                yield call.text


class PythonicCalls:
    """A list of calls as Python writes them, `[f(a=1), g(b="x")]`; each is told when the list is complete."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, text: str) -> list[Piece]:
        """See `ToolParser`."""
        self._text += text
        if self._text.lstrip()[:1] in ("", "["):
            return []
        text, self._text = self._text, ""
        return [text]

    def finish(self) -> list[Piece]:
        """See `ToolParser`."""
        text, self._text = self._text, ""
        try:
            return list(_python_calls(text))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return [text] if text else []


PARSERS: dict[str, Callable[[], ToolParser]] = {
    "hermes": lambda: JsonCalls("<tool_call>", "</tool_call>"),
    "llama3_json": lambda: JsonCalls(),
    "mistral": lambda: JsonCalls("[TOOL_CALLS]"),
    "pythonic": PythonicCalls,
}
"""By the name that `--tool-call-parser` has for the format."""

MARKED_BY_SPECIAL_TOKENS = ("mistral",)
"""Formats whose marks are special tokens, which must stay in the text to be seen."""


class _Call:
    """One JSON object as it grows: reads no more of JSON than where its values begin and end."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.is_told = False
        self.is_complete = False
        self._untold: list[str] = []
        """All characters, until it is known that this is a call."""
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._key: str | None = None
        """Of the value that is read; None while a key is."""
        self._value: list[str] = []
        """Characters of a key, of the name, or of arguments that are JSON in a string."""
        self._name: str | None = None
        self._arguments: list[str] = []
        self._has_arguments = False
        self._begins_value = False

    @property
    def text(self) -> str:
        """All of it, while it is not told."""
        return "".join(self._untold)

    def feed(self, text: str) -> int:
        """Take what belongs to the object; how many characters that are."""
        for used, char in enumerate(text, start=1):
            if not self.is_told:
                self._untold.append(char)
            self._step(char)
            if self.is_complete:
                return used
        return len(text)

    def take(self) -> CallDelta | None:
        """What came new, once the name is known."""
        if self._name is None or (self.is_told and not self._arguments):
            return None
        name, arguments = None if self.is_told else self._name, "".join(self._arguments)
        self.is_told = True
        self._untold.clear()
        self._arguments.clear()
        return CallDelta(self.index, name, arguments)

    def _step(self, char: str) -> None:
        if self._in_string:
            self._in_string = char != '"' or self._is_escaped
            self._is_escaped = char == "\\" and not self._is_escaped
            self._collect(char)
        elif char == '"':
            self._in_string = True
            self._collect(char)
        elif char in "{[":
            self._depth += 1
            if self._depth > 1:
                self._collect(char)
        elif char in "}]":
            self._depth -= 1
            if self._depth:
                self._collect(char)
            else:
                self._end_value()
                self.is_complete = True
                if not self._has_arguments:
                    self._arguments.append("{}")
        elif self._depth == 1 and char == ":" and self._key is None:
            self._key = _string("".join(self._value)) or ""
            self._value, self._begins_value = [], True
        elif self._depth == 1 and char == ",":
            self._end_value()
            self._key, self._value = None, []
        elif not (self._depth == 1 and char.isspace()):
            self._collect(char)

    def _collect(self, char: str) -> None:
        is_quoted = bool(self._value) or (self._begins_value and char == '"')
        self._begins_value = False
        if self._key in _ARGUMENTS and not is_quoted:
            self._arguments.append(char)
        elif self._key is None or self._key == "name" or self._key in _ARGUMENTS:
            self._value.append(char)

    def _end_value(self) -> None:
        value = _string("".join(self._value))
        if self._key == "name" and self._name is None:
            self._name = value
        elif self._key in _ARGUMENTS and value:
            self._arguments.append(value)
        self._has_arguments |= self._key in _ARGUMENTS


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _begun_at_the_end(text: str, mark: str) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def _joined(pieces: Iterator[Piece]) -> list[Piece]:
    """Texts that follow each other as one."""
    found: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def _python_calls(text: str) -> Iterator[CallDelta]:
    """The calls of a list; `ValueError` where it is none."""
    tree = ast.parse(text.strip(), mode="eval").body
    if not isinstance(tree, ast.List) or not 0 < len(tree.elts) <= _MOST_CALLS:
        raise ValueError("no list of calls")
    found = []
    for index, call in enumerate(tree.elts):
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("no call, or one with arguments that have no names")
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        found.append(CallDelta(index, ast.unparse(call.func), json.dumps(arguments, ensure_ascii=False)))
    yield from found
