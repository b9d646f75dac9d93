"""Steps timed on a CPU."""

import re

import pytest

from bench.step import StepBench, main, weight_bytes
from engine import LLM
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec


def test_rows_are_printed(checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(checkpoint(CheckpointSpec(kind="llama")))
    sizes = ["--requests", "1", "3", "--context", "40", "--prompt", "0", "17", "--seconds", "0.05"]
    main(["--model", model, "--device", "cpu", *sizes])
    lines = capsys.readouterr().out.splitlines()
    assert "sequences of 40 tokens" in lines[0]
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "1 requests", "3 requests", "1 requests and a prompt of 17", "3 requests and a prompt of 17",
    ]  # fmt: skip
    assert all(re.fullmatch(r".*: [\d.]+ ms, [\d.]+ GB, \d+% of memory's speed", line) for line in lines[1:])


def test_bytes(checkpoint: MakeCheckpoint) -> None:
    spec = CheckpointSpec(kind="llama")
    with LLM(str(checkpoint(spec)), device="cpu", dtype="float32", max_num_seqs=4, block_size=16) as llm:
        runner = llm._core.runner
        kv_heads, head_dim = runner.config.text_config.num_key_value_heads, runner.config.text_config.head_dim
        found = StepBench(runner, 33, seconds=0.01).measure(2, 0)
        of_blocks = found.bytes_read - weight_bytes(runner)
        layers = runner.config.text_config.num_hidden_layers
        assert of_blocks == 2 * 3 * 16 * layers * 2 * kv_heads * head_dim * 4  # two of three blocks each
        assert found.watts is None and found.joules is None
        every = sum(weight.nbytes for weight in runner.model.parameters())
        assert weight_bytes(runner) < every <= 2 * weight_bytes(runner)
        with pytest.raises(ValueError, match="the KV cache is too small"):
            StepBench(runner, 33, seconds=0.01).measure(runner.num_blocks, 0)
