"""Flags: what is taken, what is refused and in which words, and what is read from the checkpoint."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.args import DEMO_MODEL, EngineArgs
from engine.config import EngineConfig, create_config
from engine.errors import ModelLoadError
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec

SPEC = CheckpointSpec()
OPTIONAL = {flag.name for flag in EngineArgs.flags() if flag.default is None}


@pytest.fixture(scope="module")
def folder(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint(SPEC)


def config(folder: Path, **flags: Any) -> EngineConfig:
    return create_config(EngineArgs(str(folder), **{"device": "cpu", **flags}))


def changed(folder: Path, target: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint, one of whose JSON files is different."""
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    content = json.loads((target / file).read_text())
    change(content)
    (target / file).write_text(json.dumps(content))
    return target


def test_defaults(folder: Path) -> None:
    made = config(folder)
    assert made.model_path == made.tokenizer_path == folder
    assert made.served_names == [str(folder)]
    assert made.architecture == "LlavaForConditionalGeneration"
    assert (made.dtype, made.device, made.load_format) == (torch.float32, torch.device("cpu"), "auto")
    assert (made.max_model_len, made.max_num_seqs, made.max_num_batched_tokens) == (2048, 64, 2048)
    assert (made.block_size, made.num_blocks, made.kv_cache_memory_bytes) == (16, None, None)
    assert made.enable_prefix_caching
    assert made.pipeline_depth == 1
    assert made.eos_token_ids == [2]
    assert made.sampling_defaults == {}
    vision = made.vision
    assert vision is not None
    assert (vision.input_type, vision.image_token_id, vision.feature_size) == ("pixel_values", 700, 16)
    assert (vision.input_shape, vision.feature_dim, vision.max_images) == ((1, 3, 56, 56), 32, 128)
    assert vision.processor is not None


def test_text_only_model_has_no_vision(checkpoint: MakeCheckpoint) -> None:
    made = config(checkpoint(CheckpointSpec(kind="llama")))
    assert made.vision is None
    assert made.encoder_cache_tokens == 0
    assert made.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("flags", "field", "expected"),
    [
        ({"max_model_len": 100}, "max_model_len", 100),
        ({"max_num_seqs": 1}, "max_num_seqs", 1),
        ({"max_num_batched_tokens": 1}, "max_num_batched_tokens", 1),
        ({"block_size": 32}, "block_size", 32),
        ({"num_gpu_blocks_override": 7}, "num_blocks", 7),
        ({"kv_cache_memory_bytes": 1 << 20}, "kv_cache_memory_bytes", 1 << 20),
        ({"gpu_memory_utilization": 1}, "gpu_memory_utilization", 1),
        ({"enable_prefix_caching": False}, "enable_prefix_caching", False),
        ({"seed": 2**63 - 1}, "seed", 2**63 - 1),
        ({"dtype": "bfloat16"}, "dtype", torch.bfloat16),
        ({"dtype": "bfloat16"}, "kv_cache_dtype", torch.bfloat16),
        ({"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, "kv_cache_dtype", torch.float8_e4m3fn),
        ({"served_model_name": "one"}, "served_names", ["one"]),
        ({"served_model_name": ["one", "two"]}, "served_names", ["one", "two"]),
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs", 0),
        ({"load_format": "dummy"}, "load_format", "dummy"),
        ({"distributed_executor_backend": "mp"}, "architecture", "LlavaForConditionalGeneration"),
    ],
)
def test_values_are_taken(flags: dict[str, Any], field: str, expected: Any, folder: Path) -> None:
    assert getattr(config(folder, **flags), field) == expected


@pytest.mark.parametrize("shape", ["1,3,56,56", " 1, 3, 56, 56", (1, 3, 56, 56), [1, 3, 56, 56]])
def test_image_flags_that_agree(shape: Any, folder: Path) -> None:
    given = {"image_input_type": "pixel_values", "image_token_id": 700, "image_feature_size": 16}
    assert config(folder, **given, image_input_shape=shape).vision == config(folder).vision


@pytest.mark.parametrize(
    ("limit", "images"),
    [
        ("image=4", 4),
        ({"image": 3}, 3),
        ("image=0", 0),
        ('{"image": 2}', 2),
        (None, 6),
        ("image=100", 100),
        ('{"image": 2, "video": 0}', 2),
        ("video=0", 6),
    ],
)
def test_image_limit(limit: Any, images: int, folder: Path) -> None:
    vision = config(folder, limit_mm_per_prompt=limit, max_model_len=100).vision
    assert vision is not None
    assert vision.max_images == images


@pytest.mark.parametrize(
    ("spec", "size", "width"),
    [
        (CheckpointSpec(vision_feature_select_strategy="full"), 17, 32),
        (CheckpointSpec(vision_feature_layer=(-2, -1, 1)), 16, 96),
        (CheckpointSpec(image_size=28), 4, 32),
    ],
)
def test_image_size_follows_from_the_tower(
    spec: CheckpointSpec, size: int, width: int, checkpoint: MakeCheckpoint
) -> None:
    vision = config(checkpoint(spec)).vision
    assert vision is not None
    assert (vision.feature_size, vision.feature_dim) == (size, width)


REFUSED: list[tuple[dict[str, Any], str]] = [
    *[
        ({name: value}, f"--{name.replace('_', '-')} is {value}: it must be an integer of at least 1")
        for name in (
            "max_model_len",
            "image_feature_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "num_gpu_blocks_override",
            "kv_cache_memory_bytes",
            "tensor_parallel_size",
        )
        for value in (0, -1)
    ],
    ({"max_num_queued_reqs": -1}, "--max-num-queued-reqs is -1: it must be at least 0"),
    ({"seed": -1}, "--seed is -1: it must be from 0 to 2^63 - 1"),
    ({"seed": 2**63}, f"--seed is {2**63}: it must be from 0 to 2^63 - 1"),
    ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization is 0.0: it must be above 0, at most 1"),
    ({"gpu_memory_utilization": 1.01}, "--gpu-memory-utilization is 1.01: it must be above 0, at most 1"),
    ({"gpu_memory_utilization": float("nan")}, "--gpu-memory-utilization is nan: it must be above 0, at most 1"),
    ({"block_size": 24}, "--block-size is 24: it must be a multiple of 16"),
    ({"dtype": "float64"}, "--dtype is 'float64': it must be one of auto, bfloat16, float16, float32"),
    ({"device": "tpu"}, "--device is 'tpu': it must be one of auto, cuda, cpu"),
    ({"load_format": "pt"}, "--load-format is 'pt': it must be one of auto, safetensors, dummy"),
    ({"image_input_type": "pixels"}, "--image-input-type is 'pixels': it must be one of pixel_values, image_features"),
    ({"kv_cache_dtype": "fp4"}, "--kv-cache-dtype is 'fp4': it must be one of auto, fp8"),
    ({"tensor_parallel_size": 2}, "--tensor-parallel-size is 2: only 1 is available yet"),
    ({"distributed_executor_backend": "ray"}, "--distributed-executor-backend is 'ray': it must be one of mp"),
    (
        {"num_gpu_blocks_override": 4, "kv_cache_memory_bytes": 4096},
        "--num-gpu-blocks-override and --kv-cache-memory-bytes exclude each other",
    ),
    (
        {"disable_image_processor": True, "image_processor": "a/b"},
        "--disable-image-processor and --image-processor exclude each other",
    ),
    ({"image_processor_revision": "main"}, "--image-processor-revision needs --image-processor"),
    ({"max_model_len": 2049}, "--max-model-len is 2049: the model allows at most 2048"),
    ({"image_token_id": 32000}, "--image-token-id is 32000, but the checkpoint says 700"),
    ({"image_feature_size": 576}, "--image-feature-size is 576, but the checkpoint says 16"),
    (
        {"image_input_shape": "1,3,336,336"},
        "--image-input-shape is 1,3,336,336, but the checkpoint says 1,3,56,56",
    ),
    ({"image_input_shape": "large"}, "--image-input-shape is 'large': it must look like 1,3,336,336"),
    ({"image_input_shape": ""}, "--image-input-shape is '': it must look like 1,3,336,336"),
    ({"limit_mm_per_prompt": '{"image": 1, "video": 1}'}, "video is not served: only image may be above 0"),
    ({"limit_mm_per_prompt": "{4}"}, "it must look like image=4"),
    ({"limit_mm_per_prompt": "4"}, "--limit-mm-per-prompt is '4': it must look like image=4"),
    ({"limit_mm_per_prompt": "image=many"}, "--limit-mm-per-prompt is 'image=many': it must look like image=4"),
    ({"limit_mm_per_prompt": "image=-1"}, "--limit-mm-per-prompt is 'image=-1': image must be at least 0"),
    ({"limit_mm_per_prompt": "image=1,video=2"}, "video is not served: only image may be above 0"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[str(flags) for flags, _ in REFUSED])
def test_bad_values(flags: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config(folder, **flags)
    assert "\n" not in str(caught.value)


class Odd:
    """A value of a type that no flag has."""

    def __repr__(self) -> str:
        return "odd"


@pytest.mark.parametrize("flag", [flag.name for flag in EngineArgs.flags()])
def test_types(flag: str, folder: Path) -> None:
    """`LLM` hands on whatever its caller gave; the command line gives only what fits."""
    args = EngineArgs(str(folder), device="cpu")
    for value in (Odd(), *([] if flag in OPTIONAL else [None])):
        wrong: dict[str, Any] = {flag: value}
        with pytest.raises(ValueError, match=rf"^--{flag.replace('_', '-')} is (odd|None): it must be "):
            create_config(dataclasses.replace(args, **wrong))


@pytest.mark.parametrize(
    ("flag", "value"), [("seed", True), ("seed", 1.5), ("max_num_seqs", "8"), ("image_token_id", "700")]
)
def test_what_is_no_integer(flag: str, value: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"{value!r}: it must be an integer"):
        config(folder, **{flag: value})


def test_no_model() -> None:
    with pytest.raises(ValueError, match="--model is empty"):
        create_config(EngineArgs(""))


def test_demo_model_is_the_default() -> None:
    made = create_config(EngineArgs(device="cpu"))
    assert (made.model_path, made.served_names, made.dtype) == (DEMO_MODEL, ["demo"], torch.float32)


def test_no_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert config(folder, device="auto").device == torch.device("cpu")
    with pytest.raises(ValueError, match="--device is cuda, but torch sees no GPU"):
        config(folder, device="cuda")


def test_gpu_has_deeper_pipeline_and_larger_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = config(folder, device="auto")
    assert made.device == torch.device("cuda")
    assert (made.pipeline_depth, made.max_num_seqs, made.max_num_batched_tokens) == (2, 256, 2048)
    assert config(folder, device="cpu").device == torch.device("cpu")
    assert config(folder, device="cuda", enforce_eager=True).enforce_eager


@pytest.mark.parametrize(
    "flag",
    [
        {"image_input_type": "pixel_values"},
        {"image_token_id": 700},
        {"image_input_shape": "1,3,56,56"},
        {"image_feature_size": 16},
        {"image_processor": "a/b"},
        {"limit_mm_per_prompt": "image=1"},
    ],
)
def test_vision_flags_of_a_text_only_model(flag: dict[str, Any], checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(flag)).replace('_', '-')} is given.*text-only"):
        config(checkpoint(CheckpointSpec(kind="llama")), **flag)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 64),
    ],
)
def test_context_of_stretched_models(rope: dict[str, Any], limit: int, checkpoint: MakeCheckpoint) -> None:
    spec = CheckpointSpec(kind="llama", max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0, **rope})
    assert config(checkpoint(spec)).max_model_len == limit
    with pytest.raises(ValueError, match=f"at most {limit}"):
        config(checkpoint(spec), max_model_len=limit + 1)


@pytest.mark.parametrize(("stored", "expected"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_dtype_of_the_checkpoint(stored: Any, expected: torch.dtype, checkpoint: MakeCheckpoint) -> None:
    for layout in ("classic", "new"):  # `torch_dtype` and `dtype`
        folder = checkpoint(CheckpointSpec(dtype=stored, layout=layout))
        assert config(folder).dtype == expected
        assert config(folder, dtype="float32").dtype == torch.float32


def test_generation_config(folder: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content |= {"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "top_k": None, "do_sample": True}

    made = config(changed(folder, tmp_path / "copy", "generation_config.json", change))
    assert made.eos_token_ids == [2, 5]
    assert made.sampling_defaults == {"temperature": 0.6, "top_p": 0.9}


def test_without_generation_config(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").unlink()
    assert config(tmp_path / "copy").eos_token_ids == [2]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "preprocessor_config.json"])
def test_broken_files(file: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / file).write_text("{")
    with pytest.raises(ModelLoadError, match=rf"{file} cannot be read|cannot be read.*{file}") as caught:
        config(tmp_path / "copy")
    assert "\n" not in str(caught.value)


def test_image_processor_of_another_size(folder: Path, tmp_path: Path, checkpoint: MakeCheckpoint) -> None:
    other = checkpoint(CheckpointSpec(image_size=28))
    with pytest.raises(ValueError, match=r"makes images of 3,28,28, but the vision tower takes 3,56,56"):
        config(folder, image_processor=str(other))

    def sharpen(content: dict[str, Any]) -> None:
        content["resample"] = 0

    vision = config(
        folder, image_processor=str(changed(folder, tmp_path / "copy", "preprocessor_config.json", sharpen))
    ).vision
    assert vision is not None and vision.processor is not None
    assert vision.processor.resample == 0


def test_disabled_image_processor_needs_no_description(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "copy" / name).unlink()
    vision = config(tmp_path / "copy", disable_image_processor=True).vision
    assert vision is not None
    assert vision.processor is None
    with pytest.raises(ModelLoadError, match=r"preprocessor_config\.json"):
        config(tmp_path / "copy")


def test_image_token_outside_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["image_token_index"] = 9999

    with pytest.raises(ModelLoadError, match="image token 9999 is outside the vocabulary of 704"):
        config(changed(folder, tmp_path / "copy", "config.json", change))


def test_tokenizer_of_another_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert config(folder, tokenizer=str(tmp_path / "copy")).tokenizer_path == tmp_path / "copy"
    with pytest.raises(ModelLoadError, match="tokenizer"):
        config(folder, tokenizer=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id is '2'"),
        ("generation_config.json", {"eos_token_id": [[2]]}, "eos_token_id is"),
        ("generation_config.json", {"temperature": "hot"}, "generation_config.json: temperature is 'hot'"),
        ("generation_config.json", {"top_p": 0}, "generation_config.json: top_p is 0"),
        ("config.json", {"vision_feature_layer": []}, "vision_feature_layer is empty"),
    ],
)
def test_values_that_cannot_be_served(
    file: str, change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        config(changed(folder, tmp_path / "changed", file, lambda content: content.update(change)))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("vision_config", "patch_size", 0), ("text_config", "num_key_value_heads", 3), ("text_config", "vocab_size", -1)],
)
def test_sizes_that_cannot_be(part: str, name: str, value: int, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=name):
        config(
            changed(folder, tmp_path / "changed", "config.json", lambda content: content[part].update({name: value}))
        )


def test_end_of_text_of_the_whole_model_comes_before_that_of_its_language_model(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "changed", "config.json", lambda content: content.update({"eos_token_id": 538}))
    (other / "generation_config.json").unlink()
    assert config(other).eos_token_ids == [538]
