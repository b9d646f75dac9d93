"""The host launches steps ahead of the GPU: nothing on its way there may wait for it."""

from typing import Any

import pytest
import torch
from PIL import Image

from engine import LLM, SamplingParams
from engine.grammar.structured_outputs import StructuredOutputs
from engine.step import SchedulerOutput
from engine.worker.input_batch import StepLayout
from engine.worker.model_runner import ModelRunner
from engine.worker.pending import PendingStep
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
LIMITS: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 27, "max_num_seqs": 16}


@pytest.fixture
def steps_may_not_wait(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    launched: list[int] = []
    execute = ModelRunner.execute

    def guarded(self: ModelRunner, step: SchedulerOutput) -> PendingStep:
        try:
            torch.cuda.set_sync_debug_mode("error")
            launched.append(len(step.requests))
            return execute(self, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ModelRunner, "execute", guarded)
    return launched


@pytest.mark.parametrize(
    "limits",
    [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 16}, {"kv_cache_dtype": "fp8"}],
    ids=str,
)
def test_no_step_waits_for_the_gpu(
    steps_may_not_wait: list[int], limits: dict[str, Any], checkpoint: MakeCheckpoint, photos: list[Image.Image]
) -> None:
    llm = LLM(str(checkpoint(CheckpointSpec(seed=1))), dtype="float16", device="cuda", **LIMITS, **limits)
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, min_tokens=4, ignore_eos=True),
        SamplingParams(temperature=0, min_tokens=4),
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01),
        SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2),
        SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
        SamplingParams(logit_bias={5: 3.0}, bad_words=["number", "a b"]),
        SamplingParams(allowed_token_ids=[5, 6, 7], stop_token_ids=[7], min_tokens=2),
        SamplingParams(structured_outputs=StructuredOutputs(regex="[a-z ]{3,20}")),
    ]
    for params in kinds:
        params.max_tokens = 8
    prompts = [
        {"prompt": "USER: <image>\nWhat is this? ASSISTANT:", "multi_modal_data": {"image": photos[0]}},
        {"prompt": "USER: Hello ASSISTANT:"},
    ]
    for prompt in prompts:
        llm.generate([prompt] * len(kinds), kinds, use_tqdm=False)
    assert len(steps_may_not_wait) > 8


@pytest.mark.usefixtures("steps_may_not_wait")
def test_a_waiting_step_would_be_seen(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(checkpoint(CheckpointSpec(kind="llama"))), dtype="float16", device="cuda", **LIMITS)
    runner = llm._core.runner
    embed = runner._embed

    def wait_and_embed(layout: StepLayout, tokens: torch.Tensor) -> torch.Tensor:
        tokens.sum().item()
        return embed(layout, tokens)

    monkeypatch.setattr(runner, "_embed", wait_and_embed)
    with pytest.raises(RuntimeError, match="the engine failed in this step"):
        llm.generate("USER: Hello ASSISTANT:", SamplingParams(max_tokens=2), use_tqdm=False)
