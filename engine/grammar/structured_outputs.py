"""What a client says that an answer must look like, and the same in the grammar library's words."""

import json
from dataclasses import dataclass, fields
from typing import Any

from llguidance import LLMatcher

from engine.grammar import gbnf

_MOST_BYTES = 256 << 10
"""Of a schema, expression or grammar."""
_MOST_CHOICES = 4096
_WHITE_SPACE = r"( |\n {0,20})"
"""Between the parts of a JSON document: a space, or a new line and what it is indented by. It ends, or a model could
write spaces until its answer is cut.
"""
# Without it the library works out the text that must follow, which takes seconds for a long one.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(slots=True)
class StructuredOutputs:
    """Exactly one of the first five.

    Raises:
        ValueError: there is none or more, or one is of the wrong type, empty or too large.
    """

    json: dict[str, Any] | bool | str | None = None
    """A JSON schema, or the text of one."""
    regex: str | None = None
    """An expression that the whole answer matches."""
    choice: list[str] | None = None
    grammar: str | None = None
    """GBNF if it holds `::=`, else Lark."""
    json_object: bool | None = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    """Between the parts of a JSON document."""

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "StructuredOutputs":
        """From names and values; None is as if the name were not there.

        Raises:
            ValueError: as above, or a name is not known: what it asks for would have changed the answer.
        """
        names = {field.name for field in fields(cls)}
        values = {name: value for name, value in given.items() if value is not None}
        for name in values:
            if name not in names:
                raise ValueError(f"{str(name)[:100]!r} is not available: {', '.join(sorted(names))} are")
        return cls(**values)

    def __post_init__(self) -> None:
        if self.json_object not in (None, True):
            raise ValueError("json_object must be true, or be left out")
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            told = " and ".join(given) if given else "none"
            raise ValueError(f"exactly one of {', '.join(_KINDS)} is wanted: there is {told}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} must be a string that is not empty")
            _check_size(name, len(value or ""))
        if self.choice is not None:
            self._check_choice(self.choice)
        if not isinstance(self.disable_any_whitespace, bool):
            raise ValueError("disable_any_whitespace must be true or false")
        if self.disable_any_whitespace and self.whitespace_pattern:
            raise ValueError("disable_any_whitespace and whitespace_pattern exclude each other")
        if (self.disable_any_whitespace or self.whitespace_pattern) and self.json is None and not self.json_object:
            raise ValueError("disable_any_whitespace and whitespace_pattern need json or json_object")

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    def source(self) -> str:
        """The grammar in the library's words.

        Raises:
            ValueError: it is too large, or cannot be put so.
        """
        try:
            source = json.dumps(self._grammars())
        except (TypeError, RecursionError) as error:
            raise ValueError(f"{self.kind} cannot be written as JSON: {error}") from None
        _check_size(self.kind, len(source))
        return source

    def _check_choice(self, choice: Any) -> None:
        if not isinstance(choice, list | tuple) or not all(isinstance(text, str) for text in choice):
            raise ValueError("choice must be a list of strings")
        if not 0 < len(choice) <= _MOST_CHOICES or not all(choice):
            raise ValueError(f"choice must hold 1 to {_MOST_CHOICES} strings, none of them empty")
        _check_size("choice", sum(map(len, choice)))

    def _grammars(self) -> dict[str, Any]:
        if self.json is not None or self.json_object:
            return self._json_grammars(self._schema())
        if self.grammar is not None:
            if gbnf.is_gbnf(self.grammar):
                return _lark(gbnf.to_lark(self.grammar))
            if "%llguidance" in self.grammar:
                raise ValueError("grammar sets options of the library, which are the server's to choose")
            # The client's own text comes first, so that lines are counted as the client does.
            return {"grammars": [{"lark_grammar": f"{self.grammar}\n{_OPTIONS}"}]}
        if self.choice is not None:
            return _lark(f"start: /{'|'.join(map(_escaped, self.choice))}/")
        assert self.regex is not None
        return _lark(json.loads(LLMatcher.grammar_from_regex(self.regex))["grammars"][0]["lark_grammar"])

    def _schema(self) -> dict[str, Any]:
        schema: Any = {"type": "object"} if self.json is None else self.json
        if isinstance(schema, str):
            _check_size("json", len(schema))
            try:
                schema = json.loads(schema)
            except json.JSONDecodeError as error:
                raise ValueError(f"json is no valid JSON: {error}") from None
            except (ValueError, RecursionError):
                raise ValueError("json is no valid JSON: a number is too long, or it is nested too deep") from None
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise ValueError("json must be a JSON schema: an object")
        _check_size("json", num_characters(schema))  # before it is written once more
        return schema

    def _json_grammars(self, schema: dict[str, Any]) -> dict[str, Any]:
        white_space: dict[str, Any] = {"whitespace_pattern": self.whitespace_pattern or _WHITE_SPACE}
        if self.disable_any_whitespace:
            white_space = {"whitespace_flexible": False}
        # In place of the client's own, which could have the library ignore what it cannot enforce.
        options = {"lenient": False, "coerce_one_of": False, **white_space}
        body = {"name": "body", "json_schema": {**schema, "x-guidance": options}}
        return {"grammars": [{"lark_grammar": f"{_OPTIONS}start: @body"}, body]}


def num_characters(value: Any) -> int:
    """Of all strings in a JSON value, the names in objects counted in."""
    total, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            left += one.keys()
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
    return total


def _check_size(name: str, size: int) -> None:
    if size > _MOST_BYTES:
        raise ValueError(f"{name} takes {size} bytes: at most {_MOST_BYTES} are allowed")


def _lark(text: str) -> dict[str, Any]:
    return {"grammars": [{"lark_grammar": _OPTIONS + text}]}


def _escaped(text: str) -> str:
    """A text as a regular expression that matches it alone."""
    return "".join(char if char.isalnum() else f"\\u{{{ord(char):x}}}" for char in text)
