"""Answers from an fp8 KV cache: near those of an exact one, and the same however requests are scheduled."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine import LLM, SamplingParams
from engine.kernels import torch_ops
from engine.outputs import RequestOutput
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec

SPECS = {
    "gqa": CheckpointSpec(seed=2, num_key_value_heads=2),
    "window": CheckpointSpec(seed=7, text_model="mistral", num_key_value_heads=2, sliding_window=24),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "tiny chunks": {"max_num_batched_tokens": 7},
    "few blocks": {"num_gpu_blocks_override": 24, "max_num_seqs": 16},
    "no prefix cache": {"enable_prefix_caching": False},
    "large blocks": {"block_size": 32},
}
PARAMS = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0)


@pytest.fixture(scope="module")
def prompts(photos: list[Image.Image]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for number in range(12):
        images = [photos[(number + i) % 2].crop((0, 0, 200 + 8 * number, 300)) for i in range(number % 3)]
        text = "USER: " + "<image>\n" * len(images) + f"What is number {number}? " * (1 + number % 5) + "ASSISTANT:"
        made.append({"prompt": text, "multi_modal_data": {"image": images}})
    return made


def load(folder: Path, **limits: Any) -> LLM:
    return LLM(folder, dtype="float32", device="cpu", **{"kv_cache_dtype": "fp8", **limits})


def answers(llm: LLM, prompts: list[dict[str, Any]], params: SamplingParams = PARAMS) -> list[RequestOutput]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm._core.check_integrity()
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def logprobs(output: RequestOutput) -> list[float]:
    table = output.prompt_logprobs
    assert table is not None
    pairs = zip(output.prompt_token_ids, table, strict=True)
    return [entry[token].logprob for token, entry in pairs if entry is not None]


@pytest.mark.parametrize("kind", SPECS)
def test_near_an_exact_cache(kind: str, checkpoint: MakeCheckpoint, prompts: list[dict[str, Any]]) -> None:
    folder = checkpoint(SPECS[kind])
    exact, rounded = (answers(load(folder, kv_cache_dtype=kind), prompts) for kind in ("auto", "fp8"))
    differences = [
        abs(a - b) for one, other in zip(exact, rounded, strict=True)
        for a, b in zip(logprobs(one), logprobs(other), strict=True)
    ]  # fmt: skip
    # These models' attention is sharp, which makes a small difference a large one.
    assert 1e-4 < sum(differences) / len(differences) < 0.3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", SPECS)
def test_the_same_in_every_schedule(
    kind: str,
    compiled: bool,
    checkpoint: MakeCheckpoint,
    prompts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled products sum few rows in another order than many: a key between two numbers of 8 bits may be rounded
    either way.
    """
    if not compiled:
        monkeypatch.setattr(torch_ops, "runs_compiled", lambda: False)
    tolerance = 1e-2 if compiled else 1e-3
    folder = checkpoint(SPECS[kind])
    llm = load(folder)
    expected = answers(llm, prompts)
    plain = SamplingParams(temperature=0, max_tokens=20)
    again = answers(llm, prompts, plain)
    assert max(output.num_cached_tokens for output in again) > 0
    assert tokens(again) == tokens(expected)
    assert [tokens(answers(llm, [prompt], plain))[0] for prompt in prompts] == tokens(expected)
    for name, limits in SCHEDULES.items():
        llm = load(folder, **limits)
        found = answers(llm, prompts)
        assert tokens(found) == tokens(expected), name
        for one, other in zip(found, expected, strict=True):
            assert logprobs(one) == pytest.approx(logprobs(other), abs=tolerance), name
        assert (llm._core.scheduler.num_preemptions > 0) == (name == "few blocks")
