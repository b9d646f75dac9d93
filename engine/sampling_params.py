"""How tokens are chosen for one request, and when it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.grammar.structured_outputs import StructuredOutputs

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 20
MAX_N = 16
MAX_COUNT = 2**31 - 1
"""Of `top_k`, `min_tokens` and `max_tokens`: beyond any vocabulary or context."""
MAX_LIST = 1024
"""Entries allowed in `logit_bias`, `allowed_token_ids` and `stop_token_ids`."""
MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 128
"""Characters."""


@dataclass(slots=True)
class SamplingParams:
    """Sampling parameters under the names that vLLM and OpenAI use; checked when made.

    Raises:
        ValueError: a value is out of range; the message names the field, the value and the limit.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    """None: as many as fit the context."""
    min_tokens: int = 0
    stop: list[str] | str | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    bad_words: list[str] = field(default_factory=list)
    allowed_token_ids: list[int] | None = None
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    """None: none; 0: the sampled token's alone; k: of the k best too."""
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None
    """What the answer must look like; a dict of its fields will do."""
    truncate_prompt_tokens: int | None = None
    """Keep this many tokens from the prompt's end; prompts with images cannot be cut."""

    def __post_init__(self) -> None:
        _check_integer("n", self.n, 1, MAX_N)
        _check_range("temperature", self.temperature, 0, 100)
        _check_range("top_p", self.top_p, 0, 1, low_open=True)
        _check_range("min_p", self.min_p, 0, 1)
        _check_integer("top_k", self.top_k, -1, MAX_COUNT)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_range("repetition_penalty", self.repetition_penalty, 0, 100, low_open=True)
        _check_integer("max_tokens", self.max_tokens, 1, MAX_COUNT, optional=True)
        _check_integer("min_tokens", self.min_tokens, 0, MAX_COUNT)
        _check_integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, MAX_COUNT, optional=True)
        _check_integer("seed", self.seed, -(2**63), 2**63 - 1, optional=True)
        _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}: it must not exceed max_tokens, {self.max_tokens}")
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be True or False")
        self._check_texts()
        self._check_tokens()
        self._check_structured_outputs()

    def _check_texts(self) -> None:
        self.stop = _listed("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop holds {len(self.stop)} strings: at most {MAX_STOP_STRINGS} are allowed")
        if any(not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH for text in self.stop):
            raise ValueError(f"stop: each entry must be a string of 1 to {MAX_STOP_LENGTH} characters")
        self.bad_words = _listed("bad_words", self.bad_words)
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise ValueError(f"bad_words holds {len(self.bad_words)} words: at most {MAX_BAD_WORDS} are allowed")
        if any(not isinstance(word, str) or not 0 < len(word) <= MAX_BAD_WORD_LENGTH for word in self.bad_words):
            raise ValueError(f"bad_words: each entry must be a string of 1 to {MAX_BAD_WORD_LENGTH} characters")

    def _check_tokens(self) -> None:
        self.stop_token_ids = _listed("stop_token_ids", self.stop_token_ids)
        _check_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _listed("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids is empty: no token could be sampled")
            _check_ids("allowed_token_ids", self.allowed_token_ids)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise ValueError("logit_bias must map token ids to numbers")
            try:
                self.logit_bias = {int(token): bias for token, bias in self.logit_bias.items()}
            except (TypeError, ValueError):
                raise ValueError("logit_bias: its keys must be token ids") from None
            _check_ids("logit_bias", list(self.logit_bias))
            for bias in self.logit_bias.values():
                _check_range("logit_bias", bias, -100, 100)

    def _check_structured_outputs(self) -> None:
        if self.structured_outputs is None:
            return
        if isinstance(self.structured_outputs, dict):
            try:
                self.structured_outputs = StructuredOutputs.from_dict(self.structured_outputs)
            except (TypeError, ValueError) as error:
                raise ValueError(f"structured_outputs: {error}") from None
        if not isinstance(self.structured_outputs, StructuredOutputs):
            raise ValueError("structured_outputs must be StructuredOutputs or a dict of its fields")
        # Each of these may forbid what the form demands.
        for name in ("min_tokens", "ignore_eos", "bad_words", "allowed_token_ids"):
            if getattr(self, name):
                raise ValueError(f"{name} cannot be used with structured_outputs")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < 1e-5

    def check_vocab(self, vocab_size: int) -> None:
        """Raise `ValueError` when a token id named here is not in the vocabulary."""
        named = {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or [],
            "logit_bias": list(self.logit_bias or []),
        }
        for name, ids in named.items():
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name} holds {token}: token ids go from 0 to {vocab_size - 1}")


def _listed(name: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {value!r}: it must be a list")
    return list(value)


def _check_integer(name: str, value: Any, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}: it must be an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}: it must be at least {low} and at most {high}")


def _check_range(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: it must be a finite number")
    if not low <= value <= high or (low_open and value == low):
        bound = f"above {low:g}" if low_open else f"at least {low:g}"
        raise ValueError(f"{name} is {value:g}: it must be {bound} and at most {high:g}")


def _check_ids(name: str, ids: Sequence[int]) -> None:
    if len(ids) > MAX_LIST:
        raise ValueError(f"{name} holds {len(ids)} entries: at most {MAX_LIST} are allowed")
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ValueError(f"{name} must hold token ids (integers from 0)")
