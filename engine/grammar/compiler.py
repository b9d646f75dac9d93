"""Compiles grammars to matchers, which know what tokens may come next."""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_REMEMBERED_BYTES = 16 << 20
"""Of sources whose compiled form is kept."""
_REMEMBERED_SECONDS = 1.0
"""That compiling those took: a usual schema takes one to three milliseconds, one that takes megabytes a good part of a
second.
"""
_MOST_SECONDS = 0.5
"""Of a processor, for one grammar: what it makes takes memory for as long as an answer runs."""
# Below the library's own 50,000 and 2,000: with these, the slowest grammar known takes 60 ms for a mask.
_LIMITS = LLParserLimits(step_max_items=20_000, max_items_in_row=600, verbose_errors=False)
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
        self._compiled: OrderedDict[str, tuple[LLMatcher, float]] = OrderedDict()
        """With the seconds that each took."""
        self._bytes_left, self._seconds_left = _REMEMBERED_BYTES, _REMEMBERED_SECONDS
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
                return self._compiled[source][0].deep_copy()
            if self._thread is None:
                self._thread = _deep_thread()
        compiled, seconds = self._thread.submit(self._compile, source).result()
        with self._lock:
            self._remember(source, compiled, seconds)
        return compiled.deep_copy()

    def _compile(self, source: str) -> tuple[LLMatcher, float]:
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                self._read_tokenizer(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        started = time.thread_time()
        try:
            matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        except BaseException as error:  # what Rust panics with is no Exception
            raise ValueError(f"the library failed: {_plain(str(error), source)}") from None
        told = [matcher.get_error(), *matcher.get_grammar_warnings()]
        if any(told):
            raise ValueError("; ".join(_plain(str(text), source) for text in told if text))
        # What nothing satisfies shows with the first mask only.
        mask, tried = np.zeros(-(-self._vocab_size // 32), np.int32), matcher.deep_copy()
        tried.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if tried.is_error() or not mask.any():
            raise ValueError("no answer fits it, or it is too complex")
        seconds = time.thread_time() - started
        if seconds > _MOST_SECONDS:
            raise ValueError(f"it took {seconds:.1f} s to compile: at most {_MOST_SECONDS} s are allowed")
        return matcher, seconds

    def _remember(self, source: str, compiled: LLMatcher, seconds: float) -> None:
        if source in self._compiled:
            return
        self._compiled[source] = compiled, seconds
        self._bytes_left -= len(source)
        self._seconds_left -= seconds
        while self._bytes_left < 0 or self._seconds_left < 0:
            oldest, (_, took) = self._compiled.popitem(last=False)
            self._bytes_left += len(oldest)
            self._seconds_left += took


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
    message = re.split(r"\n\s*\d+ \||\s*<backtrace>", message)[0]
    message = message.replace(". Enable 'coerce_one_of' option to approximate oneOf with anyOf", "")
    place = re.match(r"(?:at )?(\d+)\(\d+\): ", message)
    if place is not None:
        is_ours = '"%llguidance' in source  # our options stand before what we wrote, and behind what the client did
        message = message[place.end() :] if is_ours else f"line {place[1]}: {message[place.end() :]}"
    return " ".join(message.split())
