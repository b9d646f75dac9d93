"""What a request leaves in the engine's tables changes no answer of those that come after it."""

from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec

PROMPTS = [{"prompt_token_ids": [1, *range(start, start + 9)]} for start in (300, 420)]
LATER: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.5, "seed": 3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "repetition": {"repetition_penalty": 1.4},
    "presence and frequency": {"presence_penalty": 0.7, "frequency_penalty": 0.7},
    "bias": {"logit_bias": {310: 10}},
    "bad words": {"bad_words": ["taken", "apple", "other"]},
    "minimum": {"min_tokens": 3},
    "log probabilities": {"logprobs": 3},
}
SAME = ("minimum", "log probabilities")
"""Have the ids of the greedy answer."""
# Each would change what comes after it, if any of it stayed.
EARLIER: list[dict[str, Any]] = [
    {"temperature": 3, "seed": 9, "top_k": 3, "top_p": 0.5, "min_p": 0.3, "logprobs": 5},
    {"temperature": 1, "seed": 1, "top_k": 600, "top_p": 1.0},
    {"repetition_penalty": 50, "presence_penalty": 2, "frequency_penalty": 2},
    {"logit_bias": dict.fromkeys(range(300, 340), 100), "repetition_penalty": 0.1},
    {"allowed_token_ids": [301, 302], "frequency_penalty": -2},
    {"bad_words": ["a", "e", "the", "of", " "], "min_tokens": 12, "stop_token_ids": [400]},
    {"prompt_logprobs": 3, "min_tokens": 16, "ignore_eos": True},
]
Answers = dict[str, list[tuple[list[int], str, list[list[int]]]]]


@pytest.fixture(scope="module")
def folder(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint(CheckpointSpec(kind="llama", seed=4))


def engine(folder: Path, **limits: Any) -> LLM:
    return LLM(str(folder), dtype="float32", device="cpu", max_model_len=128, enable_prefix_caching=False, **limits)


def run(llm: LLM, kinds: list[dict[str, Any]]) -> list[Any]:
    """Each kind's answer to each prompt."""
    params = [SamplingParams(**{"temperature": 0, "max_tokens": 16, **kind}) for kind in kinds for _ in PROMPTS]
    return [output.outputs[0] for output in llm.generate(PROMPTS * len(kinds), params, use_tqdm=False)]


def answers(llm: LLM) -> Answers:
    """Token ids, text, and the ids whose log probabilities were told."""
    found = [
        (one.token_ids, one.text, [list(entry) for entry in one.logprobs or []]) for one in run(llm, [*LATER.values()])
    ]
    return {kind: found[i * len(PROMPTS) : (i + 1) * len(PROMPTS)] for i, kind in enumerate(LATER)}


@pytest.fixture(scope="module")
def fresh(folder: Path) -> Answers:
    """What an engine says in which each request has a slot that nobody had before."""
    with engine(folder, max_num_seqs=len(PROMPTS) * len(LATER)) as llm:
        return answers(llm)


def test_kinds_differ(fresh: Answers) -> None:
    """Else the tests below would show nothing."""
    told = {str([ids for ids, _, _ in found]) for kind, found in fresh.items() if kind not in SAME}
    assert len(told) == len(LATER) - len(SAME)


@pytest.mark.parametrize("limits", [{}, {"num_gpu_blocks_override": 5}], ids=["roomy", "few blocks"])
def test_slots_are_as_new(folder: Path, fresh: Answers, limits: dict[str, int]) -> None:
    with engine(folder, max_num_seqs=3, **limits) as llm:
        for _ in range(2):
            assert answers(llm) == fresh
            run(llm, EARLIER)
        assert answers(llm) == fresh
        assert (llm._core.scheduler.num_preemptions > 0) == bool(limits)
        llm._core.check_integrity()


def test_an_interrupted_call_leaves_nothing(folder: Path, fresh: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(folder, max_num_seqs=6) as llm:
        step, calls = llm._core.step, 0

        def interrupted() -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise KeyboardInterrupt
            return step()

        monkeypatch.setattr(llm._core, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(llm, EARLIER)
        assert answers(llm) == fresh
