"""From text to calls of tools: the same in whatever pieces it comes, and nothing lost on the way."""

import json
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.tool_parsers import PARSERS, CallDelta, NamedCall, Piece, ToolParser

NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True)
LEAVES = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
ARGUMENTS = st.dictionaries(NAMES, VALUES, max_size=3)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)
PLAIN = st.text(st.sampled_from("ab é東\n.<_"), max_size=12).map(lambda text: f"a{text}a")
"""Text around calls, in which no mark begins that is not one."""
GARBAGE = st.lists(
    st.sampled_from([
        *'{}[]":,\\ \n<>(=)', "a", "é", "<tool_call>", "</tool_call>", "</tool", "[TOOL_CALLS]", '"name": "f"',
        '"name":1', '"arguments": ', '"parameters":', '{"a": 1}', '"{}"', "f(a=1)", '{"name": "f", "arguments": {}}',
    ]),
    max_size=20,
).map("".join)  # fmt: skip
CUTS = st.lists(st.integers(0, 400), max_size=12)
FORMATS = pytest.mark.parametrize("name", PARSERS)


def parse(parser: ToolParser, pieces: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Texts (those that follow each other as one) and calls, each of a name and the text of its arguments."""
    found: list[Piece] = [piece for text in pieces for piece in parser.feed(text)] + parser.finish()
    texts, calls = [""], []
    for piece in found:
        if isinstance(piece, str):
            texts[-1] += piece
        elif piece.name is not None:
            assert piece.index == len(calls)
            calls.append((piece.name, piece.arguments))
            texts.append("")
        else:
            assert piece.index == len(calls) - 1, "what comes new is of the newest call"
            calls[-1] = calls[-1][0], calls[-1][1] + piece.arguments
    return texts, calls


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[start:end] for start, end in pairwise(places)]


def check(name: str, text: str, cuts: list[int], wanted: tuple[list[str], list[tuple[str, Any]]]) -> None:
    """The text whole, in pieces and in characters means what is wanted; white space apart."""
    found = [parse(PARSERS[name](), pieces) for pieces in ([text], split(text, cuts), text)]
    assert found[0] == found[1] == found[2]
    texts, calls = found[0]
    assert [piece.strip() for piece in texts] == [piece.strip() for piece in wanted[0]]
    assert [(called, json.loads(arguments)) for called, arguments in calls] == wanted[1]


@st.composite
def objects(draw: st.DrawFn, calls: list[tuple[str, Any]]) -> list[str]:
    """Calls as JSON in the ways that models have."""
    found = []
    for name, arguments in calls:
        written: Any = draw(st.sampled_from([arguments, json.dumps(arguments)]))
        items = [("name", name), (draw(st.sampled_from(["arguments", "parameters"])), written)]
        items += draw(st.sampled_from([[], [("id", "x"), ("more", {"name": "no", "arguments": [1, "}"]})]]))
        ordered = dict(draw(st.permutations(items)))
        indent = draw(st.sampled_from([None, 2]))
        found.append(json.dumps(ordered, ensure_ascii=draw(st.booleans()), indent=indent))
    return found


@settings(max_examples=50, deadline=None, derandomize=True)
@given(calls=CALLS, texts=st.tuples(PLAIN, PLAIN, PLAIN, PLAIN), data=st.data(), cuts=CUTS)
def test_hermes(calls: list[Any], texts: tuple[str, ...], data: st.DataObject, cuts: list[int]) -> None:
    blank = data.draw(st.sampled_from(["", "\n"]))
    written = [f"<tool_call>{blank}{call}{blank}</tool_call>" for call in data.draw(objects(calls))]
    between = [data.draw(st.sampled_from([text, "", "\n"])) for text in texts[: len(calls) + 1]]
    text = between[0] + "".join(call + after for call, after in zip(written, between[1:], strict=True))
    check("hermes", text, cuts, (between, calls))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(calls=CALLS, before=PLAIN, data=st.data(), cuts=CUTS)
def test_mistral(calls: list[Any], before: str, data: st.DataObject, cuts: list[int]) -> None:
    text = f"{before}[TOOL_CALLS] [{', '.join(data.draw(objects(calls)))}]"
    check("mistral", text, cuts, ([before] + [""] * len(calls), calls))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(calls=CALLS, data=st.data(), cuts=CUTS)
def test_llama3_json(calls: list[Any], data: st.DataObject, cuts: list[int]) -> None:
    written = data.draw(objects(calls))
    text = data.draw(st.sampled_from(["; ".join(written), f" [{','.join(written)}]\n"]))
    check("llama3_json", text, cuts, ([""] * (len(calls) + 1), calls))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(calls=CALLS, cuts=CUTS)
def test_pythonic(calls: list[Any], cuts: list[int]) -> None:
    calls = [(f"{name}_", {f"{key}_": value for key, value in arguments.items()}) for name, arguments in calls]
    written = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for name, arguments in calls
    ]
    check("pythonic", f" [{', '.join(written)}]", cuts, ([""] * (len(calls) + 1), calls))


@FORMATS
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=GARBAGE, cuts=CUTS)
def test_of_garbage_nothing_is_lost_or_invented(name: str, text: str, cuts: list[int]) -> None:
    texts, calls = parse(PARSERS[name](), [text])
    assert parse(PARSERS[name](), split(text, cuts)) == parse(PARSERS[name](), text) == (texts, calls)
    if not calls:
        assert "".join(texts) == text
    place = 0
    for piece in texts:
        place = text.index(piece, place) + len(piece)


@pytest.mark.parametrize("name", ["llama3_json", "pythonic"])
@pytest.mark.parametrize("text", ["[1] is a footnote", '{"a": 1} is an object', "[see below]", " [", "[]", "{", "  x"])
def test_what_only_looks_like_a_call_is_text(name: str, text: str) -> None:
    assert parse(PARSERS[name](), text) == ([text], [])


@pytest.mark.parametrize(
    "text",
    ['f(a=b"x")', "f(a={1, 2})", "f(a=1j)", "f(a=...)", "f(a=1e999)", 'f(a="\\ud800")', "f(**a)", "f(1)", "f(a=b)",
     "f(a={(1, 2): 3})", '"f"(a=1)', "f()(a=1)", "f(a=0x" + "f" * 5000 + ")", "f", "(lambda: 0)()"],
)  # fmt: skip
def test_python_that_json_does_not_have_is_text(text: str) -> None:
    assert parse(PARSERS["pythonic"](), [f"[{text}]"]) == ([f"[{text}]"], [])


def test_python_with_odd_escapes_and_dots() -> None:
    assert parse(PARSERS["pythonic"](), [r'[a.b(c="\d")]']) == (["", ""], [("a.b", r'{"c": "\\d"}')])


@pytest.mark.parametrize("deep", ["-" * 10**5, "(" * 10**5, "not " * 10**5, "a." * 10**5, "f()" * 10**5, "{" * 10**5])
def test_what_is_nested_deep_is_text(deep: str) -> None:
    assert parse(PARSERS["pythonic"](), [f"[f(a={deep}"]) == ([f"[f(a={deep}"], [])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": ""}', "{}"),
        ('{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 2}}', '{"a": 1}'),
        ('{"arguments": {"a": "}"}, "name": "f"}', '{"a": "}"}'),
        ('{"name": "f", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}', '{"a": "?"}'),
    ],
)
def test_arguments(text: str, arguments: str) -> None:
    assert parse(PARSERS["llama3_json"](), text) == (["", ""], [("f", arguments)])


def test_arguments_come_as_they_are_written() -> None:
    parser = PARSERS["hermes"]()
    assert parser.feed('Yes. <tool_call>\n{"name": "f", "argum') == ["Yes. ", CallDelta(0, "f", "")]
    assert parser.feed('ents": {"a": [1') == [CallDelta(0, None, '{"a": [1')]
    assert parser.feed(", 2]") == [CallDelta(0, None, ", 2]")]
    assert parser.feed("}}\n</tool_call> B") == [CallDelta(0, None, "}"), " B"]


def test_half_a_mark_waits() -> None:
    parser = PARSERS["hermes"]()
    assert parser.feed("a <tool") == ["a "]
    assert parser.feed("box>") == ["<toolbox>"]
    assert parser.feed("<tool_call") == []
    assert parser.finish() == ["<tool_call"]


def test_a_call_that_was_cut() -> None:
    assert parse(PARSERS["hermes"](), '<tool_call>{"name": "f", "arguments": {"a') == (["", ""], [("f", '{"a')])
    assert parse(PARSERS["hermes"](), '<tool_call>{"name": "f') == (['<tool_call>{"name": "f'], [])


def test_named() -> None:
    assert parse(NamedCall("f"), ["", '{"a"', ": 1}"]) == (["", ""], [("f", '{"a": 1}')])


@FORMATS
@pytest.mark.parametrize(
    "text",
    [
        lambda size: " " + "a" * size,
        lambda size: "{}" * (size // 2),
        lambda size: "<tool_call></tool_call>" * (size // 23),
        lambda size: '<tool_call>[TOOL_CALLS][{"name": "f", "arguments": {"a": "' + "x" * size,
        lambda size: ' [f(a="' + "x" * size + '")]',
    ],
    ids=range(5),
)
def test_a_megabyte(name: str, text: Callable[[int], str]) -> None:
    """What is quadratic takes a minute."""
    parser, whole = PARSERS[name](), text(1 << 20)
    begun = time.thread_time()
    for start in range(0, len(whole), 8):
        parser.feed(whole[start : start + 8])
    parser.finish()
    PARSERS[name]().feed(whole)
    assert time.thread_time() - begun < 8


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3_json", '{"name": "Alice", "age": 30}'),
        ("llama3_json", '[{"name": "Alice", "arguments": {}}]'),
        ("hermes", '<tool_call>{"name": "Alice", "arguments": {}}</tool_call>'),
        ("mistral", '[TOOL_CALLS][{"name": "Alice", "arguments": {}}]'),
        ("pythonic", "[Alice(age=30)]"),
    ],
)
def test_what_names_no_tool_is_text(name: str, text: str) -> None:
    for pieces in ([text], text):
        texts, calls = parse(PARSERS[name](names={"f"}), pieces)
        assert "".join(texts) == text and not calls
    called = text.replace("Alice", "f")
    assert [call for call, _ in parse(PARSERS[name](names={"f"}), [called])[1]] == ["f"]
