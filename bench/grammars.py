"""What structured output costs the host: compiling a schema, and the mask of each token of a document.

python -m bench.grammars TOKENIZER.json --vocab-size N

Measures llguidance as the engine uses it, and xgrammar beside it if installed. Times are of the calling thread on the
CPU, so that other work of the machine does not count; compiling counts the threads it starts too.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.grammar.structured_outputs import StructuredOutputs

_TEXT: dict[str, Any] = {"type": "string"}
_LINE = {
    "type": "object",
    "properties": {"text": _TEXT, "count": {"type": "integer", "minimum": 1}, "price": {"type": "number"}},
    "required": ["text", "count", "price"],
    "additionalProperties": False,
}
_SHAPES = [
    {
        "type": "object",
        "properties": {"kind": {"const": kind}, "size": {"type": "number"}},
        "required": ["kind", "size"],
    }
    for kind in ("circle", "square", "star")
]
_NODE = {
    "type": "object",
    "properties": {"name": _TEXT, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
    "required": ["name", "children"],
}
_NAMES = [f"field_{number:03}" for number in range(100)]

SCHEMAS: dict[str, tuple[dict[str, Any], Any]] = {
    "label": (
        {"type": "object", "properties": {"label": {"enum": ["yes", "no"]}}, "required": ["label"]},
        {"label": "no"},
    ),
    "lines": (
        {
            "type": "object",
            "properties": {"lines": {"type": "array", "items": _LINE, "maxItems": 20}},
            "required": ["lines"],
        },
        {"lines": [{"text": f"Blue box, size {n}", "count": n, "price": 9.5 * n} for n in range(1, 6)]},
    ),
    "formats": (
        {
            "type": "object",
            "properties": {
                "day": {"type": "string", "format": "date"},
                "mail": {"type": "string", "format": "email"},
                "plate": {"type": "string", "pattern": "^[A-Z]{1,3}-[A-Z]{1,2} [0-9]{1,4}$"},
            },
            "required": ["day", "mail", "plate"],
        },
        {"day": "2024-02-29", "mail": "jane.doe@example.com", "plate": "M-AB 1234"},
    ),
    "shapes": (
        {"type": "array", "items": {"anyOf": _SHAPES}},
        [{"kind": "star", "size": 2.5}, {"kind": "circle", "size": 1}, {"kind": "square", "size": 40}],
    ),
    "tree": (
        {"$defs": {"node": _NODE}, "$ref": "#/$defs/node"},
        {"name": "root", "children": [{"name": "left", "children": []}, {"name": "right", "children": []}]},
    ),
    "100 properties": (
        {"type": "object", "properties": dict.fromkeys(_NAMES, _TEXT), "required": _NAMES[::2]},
        dict.fromkeys(_NAMES[::2], "some text"),
    ),
    "any object": ({"type": "object"}, {"answer": "A cat.", "objects": ["cat", "mat"], "more": {"a": [1, None]}}),
}


class Library(Protocol):
    """What is measured of one."""

    def compile(self, schema: str) -> Any:
        """Compile, with nothing remembered of earlier schemas."""

    def matcher(self, compiled: Any) -> Any:
        """Begin a document."""

    def fill(self, matcher: Any, rows: NDArray[np.int32]) -> None:
        """Write the mask of the next token."""

    def accept(self, matcher: Any, token: int) -> bool:
        """Take a token; False says that it does not fit."""


class _Llguidance:
    def __init__(self, tokenizer: str, vocab_size: int, end: int) -> None:
        self._module = importlib.import_module("llguidance")
        self.tokenizer = self._module.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=[end])

    def compile(self, schema: str) -> Any:
        source = StructuredOutputs(json=schema).source()
        matcher = self._module.LLMatcher(self.tokenizer, source, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def matcher(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def fill(self, matcher: Any, rows: NDArray[np.int32]) -> None:
        matcher.unsafe_compute_mask_ptr(rows.ctypes.data, rows.nbytes)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.consume_token(token))


class _Xgrammar:
    def __init__(self, tokenizer: str, vocab_size: int, end: int) -> None:
        self._module = importlib.import_module("xgrammar")
        read = importlib.import_module("tokenizers").Tokenizer.from_str(tokenizer)
        words = [""] * vocab_size
        for word, index in read.get_vocab().items():
            words[index] = word
        for index, added in read.get_added_tokens_decoder().items():
            if added.special and index != end:
                words[index] = ""
        kind = self._module.VocabType.BYTE_FALLBACK
        info = self._module.TokenizerInfo(words, kind, vocab_size=vocab_size, stop_token_ids=[end])
        self._compiler = self._module.GrammarCompiler(info, max_threads=2, cache_enabled=False)

    def compile(self, schema: str) -> Any:
        return self._compiler.compile_json_schema(schema, strict_mode=False)

    def matcher(self, compiled: Any) -> Any:
        return self._module.GrammarMatcher(compiled)

    def fill(self, matcher: Any, rows: NDArray[np.int32]) -> None:
        matcher.fill_next_token_bitmask(rows)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))


def measure(library: Library, encode: Callable[[str], list[int]], vocab_size: int, repeats: int = 5) -> list[str]:
    """One line of figures a schema, and one of all."""
    rows = np.zeros((1, (vocab_size + 31) // 32), dtype=np.int32)
    lines, every = [], []
    for name, (schema, document) in SCHEMAS.items():
        compiling, masks = [], []
        tokens = encode(json.dumps(document))
        for _ in range(repeats):
            started = time.process_time()
            compiled = library.compile(json.dumps(schema))
            compiling.append(time.process_time() - started)
            matcher = library.matcher(compiled)
            for token in tokens:
                started = time.thread_time()
                library.fill(matcher, rows)
                masks.append(time.thread_time() - started)
                if not library.accept(matcher, token):
                    raise RuntimeError(f"{name}: the document does not fit")
        lines.append(f"{name:16}{np.median(compiling) * 1e3:9.2f} ms {_spread(masks)}")
        every += masks
    return [*lines, f"{'all':28} {_spread(every)}"]


def _spread(seconds: list[float]) -> str:
    median, most, longest = (np.percentile(seconds, share) * 1e6 for share in (50, 99, 100))
    return f"{median:9.1f} µs {most:9.1f} µs {longest:9.1f} µs"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--end", type=int, default=2, help="the id that ends an answer")
    args = parser.parse_args()
    tokenizer = args.tokenizer.read_text()
    llguidance = _Llguidance(tokenizer, args.vocab_size, args.end)
    print(f"{'':18}  compile     mask: median       99 of 100      longest")
    for kind in (_Llguidance, _Xgrammar):
        try:
            library = kind(tokenizer, args.vocab_size, args.end)
        except ModuleNotFoundError as error:
            print(f"{error.name} is not installed")
            continue
        print(
            f"{kind.__name__[1:].lower()}\n  "
            + "\n  ".join(measure(library, llguidance.tokenizer.tokenize_str, args.vocab_size))
        )


if __name__ == "__main__":
    main()
