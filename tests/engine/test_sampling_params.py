import math
from typing import Any

import pytest

from engine.sampling_params import (
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_LIST,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    SamplingParams,
)

# name, lowest and highest allowed, just below and just above them
FLOATS = [
    ("temperature", 0, 100, -0.01, 100.1),
    ("top_p", 1e-9, 1, 0, 1.001),
    ("min_p", 0, 1, -0.001, 1.001),
    ("presence_penalty", -2, 2, -2.001, 2.001),
    ("frequency_penalty", -2, 2, -2.001, 2.001),
    ("repetition_penalty", 1e-9, 100, 0, 100.1),
]
INTEGERS = [
    ("n", 1, MAX_N, 0, MAX_N + 1),
    ("top_k", -1, 2**31 - 1, -2, 2**31),
    ("max_tokens", 1, 2**31 - 1, 0, 2**31),
    ("min_tokens", 0, 16, -1, None),
    ("seed", -(2**63), 2**63 - 1, -(2**63) - 1, 2**63),
    ("logprobs", 0, MAX_LOGPROBS, -1, MAX_LOGPROBS + 1),
    ("prompt_logprobs", 0, MAX_LOGPROBS, -1, MAX_LOGPROBS + 1),
]


@pytest.mark.parametrize(("name", "low", "high", "below", "above"), FLOATS + INTEGERS)
def test_ranges(name: str, low: float, high: float, below: float, above: float | None) -> None:
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (below, above):
        if value is not None:
            with pytest.raises(ValueError, match=f"^{name} is "):
                SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [row[0] for row in FLOATS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", [1]])
def test_floats_are_finite_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} is "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [row[0] for row in INTEGERS])
@pytest.mark.parametrize("value", [1.0, 1.5, math.nan, True, "1"])
def test_integers_are_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*: it must be an integer"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["seed", "max_tokens", "logprobs", "prompt_logprobs"])
def test_none_is_allowed(name: str) -> None:
    assert getattr(SamplingParams(**{name: None}), name) is None


def test_min_tokens_is_not_above_max_tokens() -> None:
    assert SamplingParams(min_tokens=3, max_tokens=3).min_tokens == 3
    assert SamplingParams(min_tokens=300, max_tokens=None).min_tokens == 300
    with pytest.raises(ValueError, match="min_tokens is 4: it must not exceed max_tokens, 3"):
        SamplingParams(min_tokens=4, max_tokens=3)


@pytest.mark.parametrize(
    ("given", "expected"), [(None, []), ("end", ["end"]), (["a", "b"], ["a", "b"]), (("a",), ["a"]), ([], [])]
)
def test_stop_becomes_a_list(given: Any, expected: list[str]) -> None:
    assert SamplingParams(stop=given).stop == expected


@pytest.mark.parametrize(
    "params",
    [
        {"stop": ["a"] * (MAX_STOP_STRINGS + 1)},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": "a" * (MAX_STOP_LENGTH + 1)},
        {"stop": [1]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [True]},
        {"stop_token_ids": [1.0]},
        {"stop_token_ids": [1] * (MAX_LIST + 1)},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [-1]},
        {"allowed_token_ids": [1] * (MAX_LIST + 1)},
        {"bad_words": [""]},
        {"bad_words": ["a"] * (MAX_BAD_WORDS + 1)},
        {"bad_words": ["a" * (MAX_BAD_WORD_LENGTH + 1)]},
        {"bad_words": "abc"},
        {"bad_words": [5]},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"allowed_token_ids": 5},
        {"logit_bias": [1]},
        {"logit_bias": {1: "2"}},
        {"logit_bias": {1: None}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {1: 100.1}},
        {"logit_bias": {1: -100.1}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": dict.fromkeys(range(MAX_LIST + 1), 1)},
        {"logit_bias": {"x": 1}},
    ],
)
def test_bad_lists(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        SamplingParams(**params)


def test_largest_lists() -> None:
    params = SamplingParams(
        stop=["a" * MAX_STOP_LENGTH] * MAX_STOP_STRINGS,
        stop_token_ids=[1] * MAX_LIST,
        allowed_token_ids=[0] * MAX_LIST,
        bad_words=["a" * MAX_BAD_WORD_LENGTH] * MAX_BAD_WORDS,
        logit_bias=dict.fromkeys(range(MAX_LIST), -100),
    )
    assert params.logit_bias is not None
    assert len(params.logit_bias) == MAX_LIST


def test_logit_bias_keys_become_integers() -> None:
    assert SamplingParams(logit_bias={"7": 1}).logit_bias == {7: 1.0}  # type: ignore[dict-item]


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (1e-5, False), (1, False)])
def test_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).is_greedy == greedy


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_ids_outside_the_vocabulary(name: str) -> None:
    for token in (9, 10):
        params = SamplingParams(**{name: {token: 1.0} if name == "logit_bias" else [token]})
        if token < 10:
            params.check_vocab(10)
        else:
            with pytest.raises(ValueError, match=f"{name} holds 10: token ids go from 0 to 9"):
                params.check_vocab(10)


@pytest.mark.parametrize("name", ["top_k", "min_tokens", "max_tokens"])
def test_counts_beyond_any_context_are_refused(name: str) -> None:
    """They would not fit the wire."""
    with pytest.raises(ValueError, match=f"^{name} is .* at most 2147483647"):
        SamplingParams(**{"max_tokens": None, name: 10**30})


@pytest.mark.parametrize("name", ["n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "min_tokens",
                                  "frequency_penalty", "repetition_penalty", "ignore_eos", "skip_special_tokens",
                                  "include_stop_str_in_output"])  # fmt: skip
def test_none_where_a_value_is_needed(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is None: it must be "):
        SamplingParams(**{name: None})


@pytest.mark.parametrize("name", ["ignore_eos", "skip_special_tokens", "include_stop_str_in_output"])
@pytest.mark.parametrize("value", ["no", 1, []])
def test_switches_are_booleans(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*: it must be True or False"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "bad_words"])
def test_no_list_is_an_empty_one(name: str) -> None:
    assert getattr(SamplingParams(**{name: None}), name) == []
