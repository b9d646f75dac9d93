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

from demo.random_checkpoint import CheckpointSpec
from engine import LLM, SamplingParams
from engine.errors import ModelLoadError
from tests.conftest import MakeCheckpoint

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
        part = config["text_config"] if name == "rope_parameters" else config
        part[name] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), "missing: language_model.norm.weight"),
        (lambda tensors: tensors.pop(QUERY), "missing: language_model.layers.1.self_attn.qkv_proj.weight"),
        (lambda tensors: tensors.update({"extra.weight": torch.zeros(1)}), "unused: extra.weight"),
        (lambda tensors: tensors.update({QUERY: torch.zeros(8, 64)}), f"{QUERY} has shape (8, 64), not (64, 64)"),
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
        ({"rope_parameters": {"rope_type": "odd", "rope_theta": 1.0}}, "odd"),
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
