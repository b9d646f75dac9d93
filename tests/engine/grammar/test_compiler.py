"""Grammars are compiled once, refused with a reason, and remembered within bounds."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engine.grammar import compiler as compiler_module
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.structured_outputs import StructuredOutputs
from tests.engine.grammar.accepting import VOCAB, tokenizer_json, tokens
from tests.random_tokenizer import EOS_ID

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"json": {"not": {"type": "string"}}}, '"not"'),
    ({"json": {"type": "array", "uniqueItems": True}}, '"uniqueItems"'),
    ({"json": {"if": {"type": "string"}, "then": {"minLength": 2}}}, '"if"'),
    ({"json": {"contains": {"type": "string"}}}, '"contains"'),
    ({"json": {"propertyNames": {"maxLength": 2}}}, '"propertyNames"'),
    ({"json": {"properties": {"a": {"$dynamicRef": "#x"}}}}, "$dynamicRef"),
    ({"json": {"type": "string", "format": "phone"}}, "Unknown format: phone"),
    ({"json": {"type": "string", "pattern": "(a"}}, "unclosed group"),
    ({"json": {"oneOf": [{"type": "integer"}, {"minimum": 3}]}}, "oneOf constraints are not supported"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 4}}, "minimum (5) is greater than maximum (4)"),
    ({"json": {"$ref": "http://127.0.0.1:9/x.json"}}, "http://127.0.0.1:9/x.json"),
    ({"json": {"$ref": "#/$defs/none"}}, "$defs"),
    ({"json": {"$ref": "#"}}, "no answer fits it"),
    ({"json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, "no answer"),
    ({"json": {"type": "nothing"}}, "nothing"),
    ({"json": {}, "whitespace_pattern": "("}, "unclosed group"),
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": r"(a)\1"}, "backreferences are not supported"),
    ({"regex": "(?=a)b"}, "look-ahead"),
    ({"choice": ["\ud800"]}, "not a Unicode scalar value"),
    ({"grammar": "start: foo"}, 'line 1: unknown name: "foo"'),
    ({"grammar": 'start: A\nA: "a"\nx: (('}, "line 3: "),
    ({"grammar": 'begin: "a"'}, "start"),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer_json, VOCAB, [EOS_ID])


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(compiler: GrammarCompiler, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (what it says is looked at)
        compiler.matcher(StructuredOutputs(**fields).source())
    told = str(raised.value)
    assert message in told
    assert len(told) < 400 and not any(part in told for part in ("\n", "llguidance", "<non-verbose", "coerce_one_of"))


def test_matchers_begin_anew(compiler: GrammarCompiler) -> None:
    source = StructuredOutputs(regex="ab").source()
    one = compiler.matcher(source)
    assert all(one.consume_token(token) for token in tokens("ab")) and one.is_accepting()
    other = compiler.matcher(source)
    assert not other.is_accepting()
    assert all(other.consume_token(token) for token in tokens("ab")) and other.is_accepting()


def counting(monkeypatch: pytest.MonkeyPatch, compiler: GrammarCompiler) -> list[str]:
    """The sources that get compiled from now on."""
    seen: list[str] = []
    compile_ = compiler._compile

    def count(source: str) -> Any:
        seen.append(source)
        return compile_(source)

    monkeypatch.setattr(compiler, "_compile", count)
    return seen


def test_the_newest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tokenizer_json, VOCAB, [EOS_ID])
    sources = [StructuredOutputs(choice=[f"{number} {'x' * 50}"]).source() for number in range(4)]
    monkeypatch.setattr(compiler, "_bytes_left", sum(map(len, sources[:3])) + 10)
    seen = counting(monkeypatch, compiler)
    for number in (0, 1, 2, 0, 3, 0, 2, 1):  # 3 drives out 1, the one longest unused
        compiler.matcher(sources[number])
    assert [sources.index(source) for source in seen] == [0, 1, 2, 3, 1]
    assert len(compiler._compiled) == 3 and compiler._bytes_left >= 0


def test_what_was_refused_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tokenizer_json, VOCAB, [EOS_ID])
    seen = counting(monkeypatch, compiler)
    for _ in range(2):
        with pytest.raises(ValueError, match="uniqueItems"):
            compiler.matcher(StructuredOutputs(json={"uniqueItems": True}).source())
    assert len(seen) == 2 and not compiler._compiled


def test_several_threads(compiler: GrammarCompiler) -> None:
    sources = [StructuredOutputs(regex=f"{number % 5}a+").source() for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        matchers = list(pool.map(compiler.matcher, sources))
    for number, matcher in enumerate(matchers):
        assert all(matcher.consume_token(token) for token in tokens(f"{number % 5}aa")) and matcher.is_accepting()


def test_deep_chains_need_a_deep_stack(compiler: GrammarCompiler) -> None:
    """2,000 would end the process on a thread of the usual size."""
    links = {f"a{n}": {"type": "array", "items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(3000)}
    schema = {"$defs": {**links, "a3000": {"type": "integer"}}, "$ref": "#/$defs/a0"}
    before = threading.stack_size()
    matcher = compiler.matcher(StructuredOutputs(json=schema).source())
    assert all(matcher.consume_token(token) for token in tokens("[[[[[")) and threading.stack_size() == before


def test_a_failure_of_the_library_is_an_error_of_the_grammar(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its panics are no `Exception`s."""

    class PanicError(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> None:
        raise PanicError("no")

    monkeypatch.setattr(compiler_module, "LLMatcher", panic)
    with pytest.raises(ValueError, match="no"):
        compiler.matcher(json.dumps({"grammars": []}))


def test_what_took_long_is_forgotten_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes memory as it takes time: an 80 x 80 schema of 8 kB some 16 MB."""
    compiler = GrammarCompiler(tokenizer_json, VOCAB, [EOS_ID])
    monkeypatch.setattr(compiler, "_seconds_left", 1e-9)
    source = StructuredOutputs(choice=["a"]).source()
    compiler.matcher(source)
    assert source not in compiler._compiled
    monkeypatch.setattr("engine.grammar.compiler._MOST_SECONDS", 0.0)
    with pytest.raises(ValueError, match="s to compile"):
        compiler.matcher(source)


def test_a_repeat_that_is_none_is_seen_at_once() -> None:
    with pytest.raises(ValueError, match="is expected"):
        StructuredOutputs(grammar='root ::= "a"{' + " " * 100_000 + "x").source()


def test_clients_do_not_choose_the_library_s_options() -> None:
    with pytest.raises(ValueError, match="options of the library"):
        StructuredOutputs(grammar='%llguidance {"no_forcing": false}\nstart: "a"').source()
