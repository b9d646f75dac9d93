"""From the text that a model writes to the calls of tools in it, as it comes."""

import ast
import json
import warnings
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Protocol

_ARGUMENTS = ("arguments", "parameters")
_STRUCTURE = "[],; \t\r\n"
"""May stand before, between and behind calls."""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What comes new of one call: its name first, then its arguments, JSON in pieces."""

    index: int
    name: str | None
    arguments: str


Piece = str | CallDelta
"""Text that is no part of a call, or what comes new of one."""


Names = Container[str] | None
"""Of the functions that there are."""


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
        names: that a call may have, None for any: an object of another name is text.
    """

    def __init__(self, opening: str = "", closing: str = "", names: Names = None) -> None:
        self._names = names
        self._opening = opening
        self._closing = closing
        self._waiting = ""
        """Text that may become part of a mark."""
        self._at = 0
        """How much of it is done with."""
        self._is_open = not opening
        self._skipped: list[str] | None = []
        """The mark, brackets and white space, which are text unless a call follows; None once one did."""
        self._is_text = False
        """Whether no call can come any more."""
        self._call: _Call | None = None
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """See `ToolParser`."""
        self._waiting, self._at = self._waiting[self._at :] + text, 0
        return _joined(self._pieces())

    def finish(self) -> list[Piece]:
        """See `ToolParser`."""
        rest, self._waiting, self._at = self._waiting[self._at :], "", 0
        if self._call is not None:
            if self._call.is_told:
                return []
            rest = self._call.text + rest  # it never became a call
        skipped, self._skipped = self._skipped, None
        if self._is_open:
            rest = rest if skipped is not None else ""  # part of a mark behind a call
            rest = "".join(skipped or []) + rest
        return _told(rest)

    def _pieces(self) -> Iterator[Piece]:
        progress = True
        while progress and self._at < len(self._waiting):
            before = self._at, self._is_open, self._call
            if self._call is not None:
                yield from self._inside(self._call)
            elif self._is_open:
                yield from self._between()
            else:
                yield from self._outside()
            progress = (self._at, self._is_open, self._call) != before

    def _outside(self) -> Iterator[Piece]:
        """Text, up to the mark behind which calls stand."""
        found = -1 if self._is_text else self._waiting.find(self._opening, self._at)
        end = found if found >= 0 else len(self._waiting)
        if found < 0 and not self._is_text:
            end -= _begun_at_the_end(self._waiting, self._opening, self._at)
        text, self._at = self._waiting[self._at : end], end
        if found >= 0:
            self._at += len(self._opening)
            self._is_open, self._skipped = True, [self._opening]
        if text:
            yield text

    def _between(self) -> Iterator[Piece]:
        """What is neither call nor text: brackets, commas, and the mark behind a call."""
        text, at = self._waiting, self._at
        if self._closing and text.startswith(self._closing, at):
            self._at += len(self._closing)
            yield from self._close(self._closing)
        elif self._opening and text.startswith(self._opening, at):
            self._skip(self._opening)
        elif any(mark.startswith(text[at : at + len(mark)]) for mark in (self._opening, self._closing) if mark):
            return  # it may become one
        elif text[at] == "{":
            self._call = _Call(self._num_calls, self._names)
        elif text[at] in _STRUCTURE:
            self._skip(text[at])
        else:
            yield from self._close("")

    def _inside(self, call: "_Call") -> Iterator[Piece]:
        self._at = call.feed(self._waiting, self._at)
        delta = call.take()
        if delta is not None:
            self._num_calls, self._skipped = call.index + 1, None
            yield delta
        if call.is_complete:
            self._call = None
            if not call.is_told:
                yield from self._close(call.text)

    def _skip(self, text: str) -> None:
        self._at += len(text)
        if self._skipped is not None:
            self._skipped.append(text)

    def _close(self, text: str) -> Iterator[Piece]:
        """Calls end here; what looked like their beginning is text, if there were none."""
        skipped, self._skipped = self._skipped, None
        self._is_open, self._is_text = False, not self._opening
        if skipped is not None or text != self._closing:
            text = "".join(skipped or []) + text
            if text:
                yield text


class PythonicCalls:
    """A list of calls as Python writes them, `[f(a=1), g(b="x")]`; each is told when the list is complete.

    `names` is as of `JsonCalls`.
    """

    def __init__(self, names: Names = None) -> None:
        self._names = names
        self._texts: list[str] = []
        self._is_text: bool | None = None
        """None until the first character that is no white space."""

    def feed(self, text: str) -> list[Piece]:
        """See `ToolParser`."""
        if self._is_text is None and text.strip():
            self._is_text = text.lstrip()[0] != "["
        self._texts.append(text)
        return _told(self._rest()) if self._is_text else []

    def finish(self) -> list[Piece]:
        """See `ToolParser`."""
        rest = self._rest()
        try:
            return list(_python_calls(rest, self._names))
        except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
            return _told(rest)

    def _rest(self) -> str:
        text = "".join(self._texts)
        self._texts.clear()
        return text


PARSERS: dict[str, Callable[..., ToolParser]] = {
    "hermes": partial(JsonCalls, "<tool_call>", "</tool_call>"),
    "llama3_json": JsonCalls,
    "mistral": partial(JsonCalls, "[TOOL_CALLS]"),
    "pythonic": PythonicCalls,
}
"""By the name that `--tool-call-parser` has for the format; each takes `names`."""

MARKED_BY_SPECIAL_TOKENS = ("mistral",)
"""Formats whose marks are special tokens, which must stay in the text to be seen."""


class _Call:
    """One JSON object as it grows: reads no more of JSON than where its values begin and end."""

    def __init__(self, index: int, names: Names) -> None:
        self.index = index
        self._names = names
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

    def feed(self, text: str, start: int) -> int:
        """Take what belongs to the object, from `start` on; where that ends."""
        for place in range(start, len(text)):
            if not self.is_told:
                self._untold.append(text[place])
            self._step(text[place])
            if self.is_complete:
                return place + 1
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
            key = _string("".join(self._value)) or ""
            self._key = "" if key in _ARGUMENTS and self._has_arguments else key
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
            self._name = value if value is not None and _may_be(value, self._names) else None
        elif self._key in _ARGUMENTS and value is not None:
            self._arguments.append(value or "{}")
        self._has_arguments |= self._key in _ARGUMENTS


def _may_be(name: str, names: Names) -> bool:
    return names is None or name in names


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    # Half of a surrogate pair can be escaped, but not sent.
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def _begun_at_the_end(text: str, mark: str, start: int) -> int:
    """How many characters at the end of a text, from `start` on, may be the beginning of a mark."""
    most = min(len(mark) - 1, len(text) - start)
    return next((n for n in range(most, 0, -1) if mark.startswith(text[-n:])), 0)


def _told(text: str) -> list[Piece]:
    return [text] if text else []


def _joined(pieces: Iterator[Piece]) -> list[Piece]:
    """Texts that follow each other as one."""
    found: list[Piece] = []
    for is_text, run in groupby(pieces, lambda piece: isinstance(piece, str)):
        same = list(run)
        found += ["".join(map(str, same))] if is_text else same
    return found


def _python_calls(text: str, names: Names) -> Iterator[CallDelta]:
    """The calls of a list; an error of some kind where it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a model writes in quotes
        tree = ast.parse(text.strip(), mode="eval").body
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError("no list of calls")
    for index, call in enumerate(tree.elts):
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("no call, or one with arguments that have no names")
        arguments = {_known(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        told = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        told.encode()  # half of a surrogate pair cannot be sent
        name = _dotted(call.func)
        if not _may_be(name, names):
            raise ValueError("no function that there is")
        yield CallDelta(index, name, told)


def _dotted(name: ast.expr) -> str:
    """`a.b`."""
    if isinstance(name, ast.Attribute):
        return f"{_dotted(name.value)}.{name.attr}"
    if not isinstance(name, ast.Name):
        raise ValueError("no name")
    return name.id


def _known(name: str | None) -> str:
    if name is None:
        raise ValueError("arguments without names")
    return name
