"""Loading weights: what does not fit is named, what is stored in another type is converted."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import LLM, SamplingParams
from engine.errors import ModelLoadError
from tests.conftest import MakeCheckpoint
from tests.oracle import hf_generate
from tests.random_checkpoint import CheckpointSpec

GREEDY = SamplingParams(temperature=0, max_tokens=8)
NORM = "language_model.model.norm.weight"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"


def spoilt(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def configured(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another configuration."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        part = config
        for key in outer:
            part = part[key]
        part[last] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), "missing: language_model.norm.weight"),
        (lambda tensors: tensors.pop(QUERY), "missing: language_model.layers.1.self_attn.qkv_proj.weight"),
        (lambda tensors: tensors.update({"extra.weight": torch.zeros(1)}), "unused: extra.weight"),
        (lambda tensors: tensors.update({QUERY: torch.zeros(8, 64)}), f"{QUERY} has shape (8, 64), not (64, 64)"),
        (lambda tensors: tensors.update({QUERY: torch.zeros(64, 64).to(torch.int8)}), f"{QUERY} is stored as int8"),
        (
            lambda tensors: tensors.update({"model.language_model.norm.weight": torch.zeros(64)}),
            "two tensors are the same",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[[dict[str, Tensor]], None], message: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = spoilt(checkpoint(), tmp_path / "spoilt", change)
    with pytest.raises(ModelLoadError, match=re.escape(message)) as caught:
        LLM(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_truncated_file(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(checkpoint(), folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelLoadError, match="cannot be read"):
        LLM(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2.*llava"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"vision_feature_select_strategy": "some"}, "some"),
        ({"vision_feature_layer": -9}, "-9"),
        ({"text_config__rope_parameters": {"rope_type": "odd", "rope_theta": 1.0}}, "odd"),
        (
            {"text_config__rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"text_config__model_type": "gpt2"}, "a LLaVA around 'gpt2' is not supported: llama, mistral are"),
        ({"vision_config__model_type": "siglip_vision_model"}, "siglip_vision_model.*CLIP is"),
        ({"vision_feature_layer": [-2, 4]}, "vision_feature_layer 4 is outside a vision tower of 3 layers"),
        ({"model_type": None}, "model_type None"),
        ({"text_config": "llama"}, "cannot be served|cannot be read"),
        ({"text_config__hidden_size": "wide"}, "cannot be served|cannot be read"),
    ],
)
def test_what_cannot_be_served_is_named(
    changes: dict[str, Any], message: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = configured(checkpoint(), tmp_path / "odd", **changes)
    with pytest.raises(ModelLoadError, match=message) as caught:
        LLM(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_stored_types_are_converted(checkpoint: MakeCheckpoint) -> None:
    for stored in ("float16", "bfloat16", "float32"):
        llm = LLM(str(checkpoint(CheckpointSpec(seed=3, dtype=stored))), device="cpu", dtype="float32")
        weights = {name: parameter.dtype for name, parameter in llm._core.runner.model.named_parameters()}
        assert set(weights.values()) == {torch.float32}
        assert len(llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8
        own = LLM(str(checkpoint(CheckpointSpec(seed=3, dtype=stored))), device="cpu")
        assert own.config.dtype == getattr(torch, stored)
        assert own.generate("Hello", GREEDY, use_tqdm=False)[0].finished


def test_old_buffers_and_unseen_layers_are_passed_over(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(CheckpointSpec(seed=4, legacy_buffers=True, vision_layers=4, vision_feature_layer=1))
    llm = LLM(str(folder), device="cpu")
    assert len(llm._core.runner.model.vision_tower.layers) == 1  # type: ignore[union-attr,arg-type]


def test_dummy_weights_need_no_file_and_repeat(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "shape"
    shutil.copytree(checkpoint(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    params = {"load_format": "dummy", "device": "cpu"}
    answers = [
        LLM(str(folder), seed=seed, **params).generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    with pytest.raises(ModelLoadError, match="safetensors"):
        LLM(str(folder), device="cpu")


def test_a_head_of_its_own_wins_over_a_tied_one(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    untied = LLM(str(checkpoint()), device="cpu", dtype="float32").generate("Hello", GREEDY, use_tqdm=False)
    folder = configured(checkpoint(), tmp_path / "tied", tie_word_embeddings=True)
    tied = LLM(str(folder), device="cpu", dtype="float32").generate("Hello", GREEDY, use_tqdm=False)
    assert tied[0].outputs[0].token_ids == untied[0].outputs[0].token_ids


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["classic", "new"])
def test_half_precision_file_computed_in_float32(stored: Any, layout: Any, checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(CheckpointSpec(seed=5, dtype=stored, layout=layout, num_key_value_heads=2))
    output = LLM(folder, device="cpu", dtype="float32").generate("Hello", GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == hf_generate(folder, output.prompt_token_ids, (), 8)


@pytest.mark.parametrize("bias", [False, True])
def test_every_parameter_holds_its_tensor(bias: bool, checkpoint: MakeCheckpoint) -> None:
    """Fused weights are the checkpoint's tensors one below the other, queries, keys and values or gate and up."""
    folder = checkpoint(CheckpointSpec(seed=6, num_key_value_heads=2, attention_bias=bias, mlp_bias=bias))
    tensors = load_file(folder / "model.safetensors")
    model = LLM(folder, device="cpu")._core.runner.model
    parameters = dict(model.named_parameters())
    for kind in ("weight", "bias") if bias else ("weight",):
        for layer in range(2):
            here, there = f"language_model.layers.{layer}.", f"language_model.model.layers.{layer}."
            parts = [tensors[f"{there}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            assert torch.equal(parameters[f"{here}self_attn.qkv_proj.{kind}"], torch.cat(parts))
            parts = [tensors[f"{there}mlp.{name}_proj.{kind}"] for name in ("gate", "up")]
            assert torch.equal(parameters[f"{here}mlp.gate_up_proj.{kind}"], torch.cat(parts))
    assert ("language_model.layers.0.self_attn.qkv_proj.bias" in parameters) == bias
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in parameters.values())


SHARD = "model-00002-of-00003.safetensors"


def _remove_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def _empty_shard(folder: Path) -> None:
    save_file({}, folder / SHARD)


def _no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def _odd_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove_shard, f"{SHARD}.*cannot be read|cannot be read.*{SHARD}"),
        (_empty_shard, f"{SHARD} cannot be read"),
        (_no_index, "the weights in .* cannot be read"),
        (_odd_index, "the weights in .* cannot be read"),
    ],
)
def test_broken_shards(
    change: Callable[[Path], None], message: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(checkpoint(CheckpointSpec(shards=3)), folder)
    change(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        LLM(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_many_names_are_not_all_listed(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {f"extra.{i}.weight": torch.zeros(1) for i in range(9)}
        del tensors[NORM]

    with pytest.raises(ModelLoadError, match=r"missing: [^;]*norm\.weight; unused: [^;]* and 4 more$"):
        LLM(spoilt(checkpoint(), tmp_path / "spoilt", change), device="cpu")


def test_other_formats_are_not_loaded(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(checkpoint(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ModelLoadError, match=r"safetensors") as caught:
        LLM(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llava", "llama", "mistral"])
def test_dummy_weights_of_every_kind(kind: Any, checkpoint: MakeCheckpoint) -> None:
    llm = LLM(checkpoint(CheckpointSpec(kind=kind)), load_format="dummy", device="cpu", dtype="float32")
    pixels = torch.ones(1, 3, 56, 56)
    prompt = {"prompt": "<image>", "multi_modal_data": {"image": pixels}} if kind == "llava" else "Hello"
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=1)
    answer = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    assert len(answer.token_ids) == 4
    assert answer.cumulative_logprob is not None
    assert abs(answer.cumulative_logprob) < 1e3


def test_cache_that_holds_no_block(checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ModelLoadError, match="--kv-cache-memory-bytes is 100: one block of 16 tokens takes 16384"):
        LLM(checkpoint(), device="cpu", kv_cache_memory_bytes=100)


def test_cache_smaller_than_the_context(checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(checkpoint(), device="cpu", num_gpu_blocks_override=2)
    assert "the cache holds 32 tokens: longer requests are refused" in caplog.text
    with pytest.raises(ValueError, match="the context is 32 tokens"):
        llm.generate({"prompt_token_ids": [5] * 32}, use_tqdm=False)
