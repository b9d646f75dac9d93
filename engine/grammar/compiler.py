"""Compiles grammars to matchers, which know what tokens may come next."""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_REMEMBERED_BYTES = 16 << 20
"""Of sources whose compiled form is kept: some dozen times as much in memory."""
_STACK_BYTES = 256 << 20
"""The compiler goes as deep as a grammar is nested; this holds what the limit on a source's size allows."""


class GrammarCompiler:
    """Keeps the newest grammars compiled. May be used from several threads.

    Args:
        read_tokenizer: gives the tokenizer as JSON (tokenizer.json); called when the first grammar comes.
        vocab_size: columns of the model's logits, which may be more than the tokenizer knows.
        eos_token_ids: what may follow a complete answer.
    """

    def __init__(self, read_tokenizer: Callable[[], str], vocab_size: int, eos_token_ids: list[int]) -> None:
        self._read_tokenizer = read_tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._room = _REMEMBERED_BYTES
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None

    def matcher(self, source: str) -> LLMatcher:
        """A matcher at the beginning of an answer.

        Raises:
            ValueError: the grammar is wrong, or asks for what the library cannot enforce.
        """
        with self._lock:
            if source in self._compiled:
                self._compiled.move_to_end(source)
                return self._compiled[source].deep_copy()
            if self._thread is None:
                self._thread = _deep_thread()
        compiled = self._thread.submit(self._compile, source).result()
        with self._lock:
            self._remember(source, compiled)
        return compiled.deep_copy()

    def _compile(self, source: str) -> LLMatcher:
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                self._read_tokenizer(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        try:
            matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
        except BaseException as error:  # what Rust panics with is no Exception
            raise ValueError(f"the library failed: {error}") from None
        told = [matcher.get_error(), *matcher.get_grammar_warnings()]
        if any(told):
            raise ValueError("; ".join(_plain(str(text), source) for text in told if text))
        # What nothing satisfies shows with the first mask only.
        mask, tried = np.zeros(-(-self._vocab_size // 32), np.int32), matcher.deep_copy()
        tried.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if tried.is_error() or not mask.any():
            raise ValueError("no answer fits it, or it is too complex")
        return matcher

    def _remember(self, source: str, compiled: LLMatcher) -> None:
        if source in self._compiled or len(source) > _REMEMBERED_BYTES:
            return
        self._compiled[source] = compiled
        self._room -= len(source)
        while self._room < 0:
            oldest, _ = self._compiled.popitem(last=False)
            self._room += len(oldest)


def _deep_thread() -> ThreadPoolExecutor:
    """One thread with a large stack, which it gets as it begins."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        executor.submit(int).result()
        return executor
    finally:
        threading.stack_size(before)


def _plain(message: str, source: str) -> str:
    """The library's complaint; its place in the source only where that is the client's own text."""
    message = re.split(r"\n\s*\d+ \|", message)[0]
    message = message.replace(". Enable 'coerce_one_of' option to approximate oneOf with anyOf", "")
    place = re.match(r"(?:at )?(\d+)\(\d+\): ", message)
    if place is not None:
        is_ours = '"%llguidance' in source  # our options stand before what we wrote, and behind what the client did
        message = message[place.end() :] if is_ours else f"line {place[1]}: {message[place.end() :]}"
    return " ".join(message.split())
