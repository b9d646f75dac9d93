"""EBNF as llama.cpp and vLLM have it (GBNF) to Lark. Each character becomes a lexeme of its own: lexemes take as much
as they can, and would take what the next rule needs.
"""

import re
from typing import NoReturn

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_DEFINITION = re.compile(r"[A-Za-z0-9_-]+[ \t]*::=")
_REPEAT = re.compile(r"\{\s*+(\d*+)\s*+(,?)\s*+(\d*+)\s*+\}")  # possessive: a failed match must not try all splits
_COMMENT = re.compile(r"(?:\s|#[^\n]*)*")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_DEEPEST = 50
_ANY = "/(?s:.)/"
_NOTHING = '""'


def is_gbnf(text: str) -> bool:
    """Whether a grammar is GBNF rather than Lark."""
    return "::=" in text


def to_lark(text: str) -> str:
    """The same language in Lark.

    Raises:
        ValueError: the grammar is wrong; the message tells the line.
    """
    return _Parser(text).grammar()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._ids: dict[str, str] = {"root": "start"}
        self._used: dict[str, int] = {}
        """Line where each name was first asked for."""

    def grammar(self) -> str:
        rules: dict[str, str] = {}
        self._skip()
        while self._peek():
            name = self._name()
            self._skip()
            self._expect("::=")
            if name in rules:
                self._fail(f"the rule {name} is there twice")
            rules[name] = self._alternatives()
            self._skip()
            if self._peek() == ")":
                self._fail("a ) too many")
        for name, line in {"root": 1, **self._used}.items():
            if name not in rules:
                raise ValueError(f"line {line}: there is no rule named {name}")
        return "".join(f"{self._id(name)}: {body}\n" for name, body in rules.items())

    def _alternatives(self) -> str:
        found = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            found.append(self._sequence())
        return " | ".join(found)

    def _sequence(self) -> str:
        items = []
        self._skip()
        while self._peek() and self._peek() not in "|)" and not _DEFINITION.match(self._text, self._at):
            items.append(self._repeated(self._item()))
        return " ".join(items) or _NOTHING

    def _item(self) -> str:
        char = self._peek()
        if char == '"':
            return self._literal()
        if char == "[":
            return self._class()
        if char == ".":
            self._at += 1
            return _ANY
        if char == "(":
            return self._group()
        if not _NAME.match(self._text, self._at):
            self._fail(f"{char!r} is not expected here")
        name = self._name()
        if name not in self._used:
            self._used[name] = self._line
        return self._id(name)

    def _repeated(self, item: str) -> str:
        """An item with the repeats behind it."""
        self._skip()
        for _ in range(_DEEPEST):
            char = self._peek()
            if not char or char not in "*+?{":
                return item
            if char == "{":
                char = self._counts()
            else:
                self._at += 1
            item = f"({item}){char}"
            self._skip()
        self._fail(f"more than {_DEEPEST - 1} repeats of one another")

    def _counts(self) -> str:
        found = _REPEAT.match(self._text, self._at)
        if found is None or not (found[1] or found[3]):
            self._fail("{n}, {n,}, {,m} or {n,m} is expected")
        least, most = int(found[1] or 0), int(found[3] or found[1] or 0)
        if most < least:
            self._fail(f"{found[0]} is empty")
        self._at = found.end()
        return f"{{{least},{'' if found[2] and not found[3] else most}}}"

    def _literal(self) -> str:
        self._at += 1
        chars = []
        while self._peek() != '"':
            chars.append(f"/[{_escaped(self._char())}]/")
        self._at += 1
        return f"({' '.join(chars) or _NOTHING})"

    def _class(self) -> str:
        self._at += 1
        is_negated = self._peek() == "^"
        self._at += is_negated
        ranges = []
        while self._peek() != "]":
            first = last = self._char()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._char()
            if last < first:
                self._fail(f"the range {first}-{last} is empty")
            ranges.append(_escaped(first) + (f"-{_escaped(last)}" if last != first else ""))
        self._at += 1
        if not ranges:
            return _ANY if is_negated else self._fail("an empty [] matches nothing")
        return f"/[{'^' * is_negated}{''.join(ranges)}]/"

    def _group(self) -> str:
        if self._depth == _DEEPEST:
            self._fail(f"more than {_DEEPEST} parentheses within one another")
        self._at += 1
        self._depth += 1
        inside = self._alternatives()
        self._depth -= 1
        self._expect(")")
        return f"({inside})"

    def _char(self) -> str:
        """One character of a literal or class."""
        char = self._peek()
        if not char:
            self._fail("the text ends within quotes or brackets")
        self._at += 1
        if char != "\\":
            return char
        escape = self._peek()
        self._at += 1
        if escape in _HEX_DIGITS:
            return self._coded(_HEX_DIGITS[escape])
        if escape in _ESCAPES:
            return _ESCAPES[escape]
        return escape if escape and not escape.isalnum() else self._fail(f"unknown escape \\{escape}")

    def _coded(self, digits: int) -> str:
        code = self._text[self._at : self._at + digits]
        self._at += digits
        if not re.fullmatch(f"[0-9A-Fa-f]{{{digits}}}", code):
            self._fail(f"{digits} hexadecimal digits are expected")
        number = int(code, 16)
        if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
            self._fail(f"{code} is no character")
        return chr(number)

    def _name(self) -> str:
        found = _NAME.match(self._text, self._at)
        if found is None:
            self._fail("a rule's name is expected")
        self._at = found.end()
        return found[0]

    def _id(self, name: str) -> str:
        """Lark's names are of other letters."""
        return self._ids.setdefault(name, f"r{len(self._ids)}")

    def _expect(self, mark: str) -> None:
        self._skip()
        if not self._text.startswith(mark, self._at):
            self._fail(f"{mark} is expected")
        self._at += len(mark)

    def _skip(self) -> None:
        found = _COMMENT.match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    @property
    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + 1

    def _fail(self, what: str) -> NoReturn:
        raise ValueError(f"line {self._line}: {what}")


def _escaped(char: str) -> str:
    return f"\\u{{{ord(char):x}}}"
