"""The line that says what was started."""

import pytest

from engine.args import EngineArgs
from engine.config import create_config
from engine.summary import summary
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_what_is_said(kind: str, checkpoint: MakeCheckpoint) -> None:
    args = EngineArgs(
        model=str(checkpoint(CheckpointSpec(kind=kind))), served_model_name=["mine"], dtype="float32", device="cpu",
        max_model_len=128, block_size=16, max_num_seqs=7,
    )  # fmt: skip
    config = create_config(args)
    line = summary(config, 100)
    assert line.startswith(f"mine: {config.architecture} in float32 on the CPU, attention by torch, up to 7 requests")
    assert "the cache of 1,600 tokens holds 7 requests of 128 tokens at once" in line
    assert "holds 1 requests of 128" in summary(config, 8)
    if config.vision is None:
        assert "images" not in line
    else:
        size = config.vision.feature_size
        assert line.endswith(f"or {1600 // size} images ({size} tokens each)")
