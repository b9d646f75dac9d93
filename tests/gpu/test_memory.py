"""A GPU that is really out of memory in a step."""

import pytest
import torch

from engine import LLM, SamplingParams
from engine.worker.memory_budget import GpuBudget, peak_bytes
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec


@pytest.mark.parametrize("eager", [True, False])
def test_a_step_that_runs_out_of_memory(eager: bool, checkpoint: MakeCheckpoint) -> None:
    """Its requests fail; what comes when there is room again gets exact answers."""
    folder = checkpoint(CheckpointSpec(seed=8, kind="llama", intermediate_size=16384, max_position_embeddings=4096))
    llm = LLM(
        str(folder), dtype="float32", device="cuda", enforce_eager=eager, max_num_seqs=8, max_model_len=4096,
        kv_cache_memory_bytes=1 << 28, enable_prefix_caching=False, max_num_batched_tokens=8192,
    )  # fmt: skip
    # Above what graphs are captured for: the memory of such a step is asked for in the step.
    prompts = [f"USER: What is number {number}? " * 150 + "ASSISTANT:" for number in range(8)]
    params = SamplingParams(temperature=0, max_tokens=8)
    wanted = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        with pytest.raises(RuntimeError, match="the GPU ran out of memory"):
            llm.generate(prompts, params, use_tqdm=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    llm._core.check_integrity()
    again = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in again] == wanted


def test_a_budget_counts_what_comes_after_it(caplog: pytest.LogCaptureFixture) -> None:
    """Not what lay there before, as long as the share is free."""
    before = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    _, total = torch.cuda.mem_get_info()
    budget = GpuBudget(0.25)
    assert not caplog.text
    after = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    assert abs(budget.left() - (total // 4 - (1 << 28))) < 64 << 20
    assert before.is_cuda and after.is_cuda


def test_a_budget_is_never_more_than_what_is_free(caplog: pytest.LogCaptureFixture) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    budget = GpuBudget(1.0)
    assert budget.left() <= free + (64 << 20)
    assert "GiB of the GPU are free: --gpu-memory-utilization asks for" in caplog.text


def test_peak() -> None:
    def run() -> None:
        first = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        del first
        torch.empty(1 << 27, dtype=torch.uint8, device="cuda")

    assert peak_bytes(run) == 1 << 28
