"""The scales of an fp8 KV cache."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM, SamplingParams
from engine.args import EngineArgs
from engine.config import create_config
from engine.errors import ModelLoadError
from engine.models.llama import LlamaAttention
from engine.models.llava import LlavaForConditionalGeneration
from engine.worker.kv_scales import check_fp8
from engine.worker.model_runner import ModelRunner
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec

SPECS = {
    "llava": CheckpointSpec(seed=2, num_key_value_heads=2),
    "text": CheckpointSpec(seed=3, kind="llama", num_key_value_heads=1),
    "window": CheckpointSpec(seed=4, kind="mistral", sliding_window=24),
}


def runner(folder: Any, **flags: Any) -> ModelRunner:
    given: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_dtype": "fp8", **flags}
    return ModelRunner(create_config(EngineArgs(str(folder), **given)))


def scales(made: ModelRunner) -> Tensor:
    """(layers, 2, kv_heads)."""
    found = [layer.kv_scales for layer in made.model.modules() if isinstance(layer, LlamaAttention)]
    return torch.stack([some for some in found if some is not None])


@pytest.mark.parametrize("kind", SPECS)
def test_one_for_each_head_and_always_the_same(kind: str, checkpoint: MakeCheckpoint) -> None:
    spec = SPECS[kind]
    found = scales(runner(checkpoint(spec)))
    assert found.shape == (spec.num_hidden_layers, 2, spec.num_key_value_heads) and found.dtype == torch.float32
    assert (torch.frexp(found).mantissa == 0.5).all(), "they are powers of two"
    for flags in ({"max_num_batched_tokens": 7}, {"max_num_seqs": 3, "seed": 5}, {"block_size": 32}):
        assert torch.equal(scales(runner(checkpoint(spec), **flags)), found)
    assert torch.equal(scales(runner(checkpoint(spec), dtype="bfloat16")).log2(), found.log2())


def test_they_leave_room(checkpoint: MakeCheckpoint) -> None:
    """What a real prompt writes lies well inside the range, and uses it."""
    llm = LLM(checkpoint(SPECS["llava"]), device="cpu", dtype="float32", kv_cache_dtype="fp8")
    llm.generate("USER: What is number 3? ASSISTANT:", SamplingParams(max_tokens=20), use_tqdm=False)
    for cache in llm._core.runner._caches:
        largest = cache[:, :-1].float().abs().amax((1, 2, 4))
        assert (largest < 448 / 4).all() and (largest > 448 / 128).all()


def test_a_short_context_is_enough(checkpoint: MakeCheckpoint) -> None:
    assert (scales(runner(checkpoint(SPECS["llava"]), max_model_len=1)) > 0).all()


def test_without_fp8_there_are_none(checkpoint: MakeCheckpoint) -> None:
    made = runner(checkpoint(SPECS["text"]), kv_cache_dtype="auto")
    assert all(layer.kv_scales is None for layer in made.model.modules() if isinstance(layer, LlamaAttention))
    assert {cache.dtype for cache in made._caches} == {torch.float32}


@pytest.mark.parametrize(("dtype", "times"), [("float32", 4), ("bfloat16", 2)])
def test_more_blocks_in_the_same_memory(
    dtype: str, times: int, checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"dtype": dtype, "kv_cache_memory_bytes": 1 << 20}
    with caplog.at_level(logging.INFO):
        made = runner(checkpoint(SPECS["llava"]), **flags)
    plain = runner(checkpoint(SPECS["llava"]), **flags, kv_cache_dtype="auto")
    assert made.num_blocks == times * plain.num_blocks
    assert sum(cache.nbytes for cache in made._caches) <= (1 << 20) + made._caches[0][:, :1].nbytes * len(made._caches)
    assert f"in {made.num_blocks} blocks of float8_e4m3fn" in caplog.text


def test_infinite_keys_are_refused(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a picture, which therefore counts."""
    encode = LlavaForConditionalGeneration.encode
    monkeypatch.setattr(LlavaForConditionalGeneration, "encode", lambda *given: encode(*given) * float("inf"))
    with pytest.raises(ModelLoadError, match="--kv-cache-dtype fp8: .* infinite"):
        runner(checkpoint(SPECS["llava"]))


def test_older_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ModelLoadError, match=r"compute capability 8\.9 or more: NVIDIA A100 is older"):
        check_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_fp8(torch.device("cuda"))
    check_fp8(torch.device("cpu"))
