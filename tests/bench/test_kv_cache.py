"""The comparison of KV caches, from answers worked out by hand, and a run of it."""

import sys
from typing import Any

import pytest

from bench.kv_cache import compare, main
from engine.outputs import CompletionOutput, Logprob, RequestOutput
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec

PICTURE = 9


def output(prompt_logprobs: list[float], answer: list[tuple[int, float]]) -> RequestOutput:
    """Of a prompt of three texts' tokens and one of a picture, which is the third; and the answer's with theirs."""
    prompt = [1, 5, PICTURE, 6]
    pairs = zip(prompt[1:], prompt_logprobs, strict=True)
    tables = [None, *({token: Logprob(x, 1, "")} for token, x in pairs)]
    answered = [{token: Logprob(x, 1, "")} for token, x in answer]
    made = CompletionOutput(0, token_ids=[token for token, _ in answer], logprobs=answered)
    return RequestOutput("", None, prompt, [made], True, prompt_logprobs=tables)


def test_figures() -> None:
    exact = [
        output([-1.0, -50.0, -2.0], [(1, -0.1), (2, -0.2), (3, -0.3), (4, -0.4)]),
        output([-1.0, -1.0, -1.0], [(7, -1.0), (8, -1.0)]),
    ]
    rounded = [
        output([-1.5, -1.0, -2.0], [(1, -0.1), (2, -0.4), (5, -9.0), (4, -0.4)]),
        output([-1.0, -1.0, -0.9], [(7, -1.0), (8, -1.0)]),
    ]
    found = compare(exact, rounded, PICTURE)
    assert (found.prompts, found.equal_answers, found.mean_equal_tokens, found.mean_answer_tokens) == (2, 0.5, 2.0, 3.0)
    assert found.of_prompts.tokens == found.of_answers.tokens == 4
    assert found.of_prompts.mean == pytest.approx(0.15) and found.of_prompts.largest == pytest.approx(0.5)
    assert found.of_answers.mean == pytest.approx(0.05) and found.of_answers.largest == pytest.approx(0.2)
    assert compare(exact, rounded, None).of_prompts.largest == 49.0


def test_answers_that_differ_from_the_start() -> None:
    found = compare([output([-1.0] * 3, [(1, -1.0)])], [output([-1.0] * 3, [(2, -1.0)])], None)
    assert (found.of_answers.tokens, found.of_answers.mean, found.mean_equal_tokens) == (0, 0.0, 0.0)


@pytest.mark.parametrize(("kind", "prompts"), [("llava", 24), ("llama", 8)])
def test_a_run(
    kind: Any,
    prompts: int,
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With every sample picture; or without, where the model sees none."""
    flags = ("--model", checkpoint(CheckpointSpec(seed=2, kind=kind)), "--device", "cpu", "--max_tokens", "2")
    monkeypatch.setattr(sys, "argv", ["kv_cache", *map(str, flags)])
    main()
    printed = capsys.readouterr().out
    assert f"{prompts} prompts: log probabilities of " in printed
    assert "% of the greedy answers are equal" in printed
