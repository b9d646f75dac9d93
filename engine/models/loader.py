"""Building a model and filling it: from safetensors, or with seeded random numbers for benchmarks."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from engine.attention import attention_backend
from engine.config import EngineConfig
from engine.errors import ModelLoadError, one_line
from engine.models.llama import LlamaForCausalLM, head_dim
from engine.models.llava import LlavaForConditionalGeneration
from engine.models.weights import canonical_name, is_unneeded, target

_DUMMY_STD = 0.02
_NAMED_IN_ERRORS = 5
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def load_model(config: EngineConfig) -> LlamaForCausalLM:
    """Build the configured model on its device and fill its weights.

    Raises:
        ModelLoadError: weights are missing, unused, misshapen or unreadable; the message names them.
    """
    dummy = config.load_format == "dummy"
    files = {} if dummy else _tensor_files(config.model_path)
    text_config = config.text_config
    if "lm_head.weight" in files:
        text_config.tie_word_embeddings = False  # a head of its own wins over the promise to share one
    model = _build(config)
    model.to_empty(device=config.device)
    model.requires_grad_(False)
    model.eval()
    if dummy:
        _fill_randomly(model, config.seed)
    else:
        _fill(model, files, config)
    with _blaming_config():
        model.finish(config.max_model_len, config.dtype, config.device)
    return model


def _build(config: EngineConfig) -> LlamaForCausalLM:
    backend = attention_backend(config.device)
    model: LlamaForCausalLM
    with _blaming_config(), torch.device("meta"):
        if config.vision is None:
            model = LlamaForCausalLM(config.hf_config, backend)
        else:
            with_tower = config.vision.input_type == "pixel_values"
            model = LlavaForConditionalGeneration(config.hf_config, backend, with_tower=with_tower)
        return model.to(config.dtype)


@contextmanager
def _blaming_config() -> Iterator[None]:
    """Any value of config.json may be one that no model can be built with, and fail in any way."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelLoadError(f"no model can be built from config.json: {one_line(error)}") from error


def _fill_randomly(model: nn.Module, seed: int) -> None:
    """Norms become the identity, all else small normal numbers."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        generator = torch.Generator(parameter.device).manual_seed(seed + index)
        parameter.normal_(0.0, _DUMMY_STD, generator=generator)


def _tensor_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Canonical name to file and name in that file."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            stored = [(name, folder / file) for name, file in weight_map.items()]
        else:
            single = folder / "model.safetensors"
            paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
            stored = [(name, path) for path in paths for name in _names(path)]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"the weights in {folder} cannot be read: {one_line(error)}") from error
    if not stored:
        raise ModelLoadError(f"{folder} holds no *.safetensors file; other formats are not loaded")
    found: dict[str, tuple[Path, str]] = {}
    for name, path in stored:
        canonical = canonical_name(name)
        if canonical in found:
            other = found[canonical]
            raise ModelLoadError(f"two tensors are the same: {other[1]} in {other[0].name}, {name} in {path.name}")
        found[canonical] = path, name
    return found


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _fill(model: LlamaForCausalLM, files: dict[str, tuple[Path, str]], config: EngineConfig) -> None:
    parameters = dict(model.named_parameters())
    missing = _expected(parameters)
    tower = getattr(model, "vision_tower", None)
    vision_layers = None if tower is None else len(tower.layers)
    by_file: dict[Path, list[tuple[str, str]]] = defaultdict(list)
    unused, problems = [], []
    for name, (path, stored) in files.items():
        if is_unneeded(name, vision_layers):
            continue
        if target(name) not in missing:
            unused.append(stored)
            continue
        missing.discard(target(name))
        by_file[path].append((name, stored))
    if missing:
        problems.append("missing: " + _some([f"{t.parameter}" for t in missing]))
    if unused:
        problems.append("unused: " + _some(unused))
    if problems:
        raise ModelLoadError(f"the weights do not fit {config.architecture}: {'; '.join(problems)}")
    total = sum(parameter.nbytes for parameter in parameters.values())
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=None) as progress:
        for path, names in by_file.items():
            _fill_from(path, names, parameters, config, progress)


def _fill_from(
    path: Path,
    names: list[tuple[str, str]],
    parameters: dict[str, nn.Parameter],
    config: EngineConfig,
    progress: Any,
) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            for name, stored in names:
                tensor = file.get_tensor(stored)
                place = _place(name, parameters, config)
                shape = _stored_shape(name, place, config)
                if tensor.shape != shape:
                    raise ModelLoadError(f"{stored} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
                if tensor.dtype not in _DTYPES:
                    kind = str(tensor.dtype).removeprefix("torch.")
                    raise ModelLoadError(f"{stored} is stored as {kind}: float16, bfloat16 and float32 are loaded")
                place.copy_(tensor.reshape(place.shape))
                progress.update(place.nbytes)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path.name} cannot be read: {error}") from error


def _place(name: str, parameters: dict[str, nn.Parameter], config: EngineConfig) -> Tensor:
    """The part of a parameter that the tensor of this name fills."""
    parameter, part = target(name)
    whole: Tensor = parameters[parameter].data
    if part is None:
        return whole
    if parameter.endswith(("gate_up_proj.weight", "gate_up_proj.bias")):
        return whole.chunk(2)[part]
    if parameter.startswith("vision_tower."):
        return whole.chunk(3)[part]
    text = config.text_config
    heads = [text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads]
    parts: tuple[Tensor, ...] = torch.split(whole, [count * head_dim(text) for count in heads])
    return parts[part]


def _stored_shape(name: str, place: Tensor, config: EngineConfig) -> torch.Size:
    """What a checkpoint holds for a place: patch embeddings are convolutions there, matrices here."""
    if not name.endswith("patch_embedding.weight"):
        return place.shape
    tower = config.hf_config.vision_config
    return torch.Size((place.shape[0], tower.num_channels, tower.patch_size, tower.patch_size))


def _expected(parameters: dict[str, nn.Parameter]) -> set[Any]:
    """Every target that a complete checkpoint fills."""
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    expected = set()
    for name in parameters:
        fused = next((key for key in parts if f".{key}." in name), None)
        names = [name] if fused is None else [name.replace(fused, part) for part in parts[fused]]
        expected |= {target(part) for part in names}
    return expected


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(set(names))[:_NAMED_IN_ERRORS])
    return shown if len(set(names)) <= _NAMED_IN_ERRORS else f"{shown} and {len(set(names)) - _NAMED_IN_ERRORS} more"
