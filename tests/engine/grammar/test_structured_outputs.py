"""What is asked of an answer's form, and what becomes of it."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.grammar.structured_outputs import StructuredOutputs
from tests.engine.grammar.accepting import accepts, compiler

LARGE = "x" * (256 << 10)
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
          "required": ["name", "age"], "additionalProperties": False}  # fmt: skip
FITTING = [
    '{"name":"A","age":5}', '{"name": "A", "age": 5}', '{\n  "name": "A",\n  "age": 5\n}', '{"name": "é", "age": -1}',
]  # fmt: skip
NOT_FITTING = [
    '{"name": "A"}', '{"age": 5, "name": "A"}', '{"name": "A", "age": 5.5}', '{"name": "A", "age": 5, "b": 1}', "{}",
    ' {"name": "A", "age": 5}', '{"name": "A", "age": 5}\n', '{"name": "A", "age": 5}}', '{"name": "A\n", "age": 5}',
    '{   "name": "A", "age": 5}',
]  # fmt: skip
DEEP: list[Any] = []
for _ in range(10**5):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object is wanted: there is none"),
        ({"regex": "a", "choice": ["b"]}, "there is regex and choice"),
        ({"json_object": False}, "json_object must be true"),
        ({"json_object": 1.5}, "json_object must be true"),
        ({"regex": ""}, "regex must be a string that is not empty"),
        ({"regex": 5}, "regex must be a string that is not empty"),
        ({"grammar": ["a"]}, "grammar must be a string that is not empty"),
        ({"choice": "ab"}, "choice must be a list of strings"),
        ({"choice": [1]}, "choice must be a list of strings"),
        ({"choice": []}, "choice must hold 1 to 4096 strings"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": ["a"] * 4097}, "choice must hold 1 to 4096 strings"),
        ({"regex": "a", "whitespace_pattern": " "}, "need json or json_object"),
        ({"choice": ["a"], "disable_any_whitespace": True}, "need json or json_object"),
        ({"json": {}, "whitespace_pattern": ""}, "whitespace_pattern must be a string that is not empty"),
        ({"regex": LARGE + "x"}, "regex takes 262145 bytes: at most 262144 are allowed"),
        ({"grammar": LARGE + "x"}, "grammar takes 262145"),
        ({"choice": [LARGE, "x"]}, "choice takes 262145"),
    ],
)  # fmt: skip
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StructuredOutputs(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json": "{"}, "json is no valid JSON"),
        ({"json": "[" * 10**5}, "json is no valid JSON"),
        ({"json": "[]"}, "json must be a JSON schema: an object"),
        ({"json": False}, "json must be a JSON schema"),
        ({"json": {"const": {1, 2}}}, "json cannot be written as JSON"),
        ({"json": {"const": DEEP}}, "json cannot be written as JSON"),
        ({"json": {"const": LARGE}}, "bytes: at most 262144 are allowed"),
        ({"json": json.dumps({"const": LARGE})}, "bytes: at most 262144 are allowed"),
        ({"grammar": 'root ::= "a'}, "line 1: the text ends within quotes"),
    ],
)
def test_what_cannot_be_put_into_words(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StructuredOutputs(**fields).source()


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON)])
def test_json(schema: Any) -> None:
    form = StructuredOutputs(json=schema)
    assert form.kind == "json"
    assert all(accepts(form, text) for text in FITTING)
    assert not any(accepts(form, text) for text in NOT_FITTING)


def test_any_json() -> None:
    assert all(accepts(StructuredOutputs(json_object=True), text) for text in ("{}", '{"a": [1, {"b": null}]}'))
    assert not any(accepts(StructuredOutputs(json_object=True), text) for text in ("[]", "1", '{"a"}', ""))
    assert all(accepts(StructuredOutputs(json=True), text) for text in ("{}", "[]", "1", '"a"'))


def test_white_space() -> None:
    documents = {"compact": '{"a":[1,2]}', "python": '{"a": [1, 2]}', "tabs": '{\t"a":\t[1,2]}', "two": '{  "a":[1,2]}'}

    def taken(**fields: Any) -> set[str]:
        form = StructuredOutputs(json_object=True, **fields)
        return {name for name, text in documents.items() if accepts(form, text)}

    assert taken() == {"compact", "python"}
    assert taken(whitespace_pattern=r"\t") == {"compact", "tabs"}
    assert taken(whitespace_pattern=r" {1,2}") == {"compact", "python", "two"}
    assert taken(disable_any_whitespace=True) == {"compact"}


def test_the_client_cannot_have_keywords_ignored() -> None:
    lenient = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(ValueError, match="uniqueItems"):
        compiler().matcher(StructuredOutputs(json=lenient).source())


def test_choice() -> None:
    form = StructuredOutputs(choice=["a+b", "a", "é|x", "/", "\\d", "new\nline", '"', "(", "東京 🌸"])
    assert form.choice is not None and all(accepts(form, text) for text in form.choice)
    assert not any(accepts(form, text) for text in ("aab", "aa", "", "x", "5", "é", "a+", "A"))


def test_lark() -> None:
    form = StructuredOutputs(grammar='start: "x=" NUMBER ("," NUMBER)*\nNUMBER: /[0-9]+/')
    assert accepts(form, "x=12,3") and not accepts(form, "x=") and not accepts(form, "x=1,")


ALPHABET = 'abcé5 \n/."東_'
"""Of letters on which Python and Rust agree: `²` is one of `\\w` in Python only."""
REGEXES = st.recursive(
    st.sampled_from(["a", "b", ".", "[a-c]", "[^a]", r"\d", r"\w", r"\s", "é", "/", r"\.", r"\n", "[東-東]", '"', " "]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        inner.map("({})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}"])).map("(?:{0[0]}){0[1]}".format),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(regex=REGEXES, data=st.data())
def test_a_regex_takes_what_python_says(regex: str, data: st.DataObject) -> None:
    form = StructuredOutputs(regex=regex)
    matching = data.draw(st.from_regex(regex, fullmatch=True, alphabet=ALPHABET))
    other = data.draw(st.text(st.sampled_from(ALPHABET), max_size=5))
    assert accepts(form, matching)
    for text in (other, (matching + other)[:8]):  # short: Python's time may be exponential
        assert accepts(form, text) == (re.fullmatch(regex, text) is not None), text


@pytest.mark.parametrize(
    "fields", [{"disable_any_whitespace": "false"}, {"disable_any_whitespace": True, "whitespace_pattern": " ?"}]
)
def test_options_that_mean_nothing_together_or_are_of_another_type(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="disable_any_whitespace"):
        StructuredOutputs(json={}, **fields)
