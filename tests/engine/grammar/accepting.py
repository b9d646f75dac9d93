"""Asks a grammar whether it takes a text."""

from functools import cache

from llguidance import LLTokenizer

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.structured_outputs import StructuredOutputs
from tests.random_tokenizer import EOS_ID, TOKENIZER_SIZE, build_tokenizer

VOCAB = TOKENIZER_SIZE + 10


@cache
def tokenizer_json() -> str:
    return build_tokenizer().to_str()


@cache
def _tokenizer() -> LLTokenizer:
    return LLTokenizer(tokenizer_json(), n_vocab=VOCAB, eos_token=[EOS_ID])


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer_json, VOCAB, [EOS_ID])


def tokens(text: str) -> list[int]:
    return list(_tokenizer().tokenize_str(text))


def accepts(form: StructuredOutputs, text: str) -> bool:
    """Whether a text is a whole answer of this form."""
    matcher = compiler().matcher(form.source())
    return all(matcher.consume_token(token) for token in tokens(text)) and bool(matcher.is_accepting())
