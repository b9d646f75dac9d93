"""What a checkpoint's own files say of it, checked before anything is built."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from engine.errors import ModelLoadError, one_line
from engine.models.clip import resolve_layer
from engine.models.llava import feature_layers
from engine.models.rotary import rope_type
from engine.sampling_params import SamplingParams

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "llava": "LlavaForConditionalGeneration",
}
_TEXT_TYPES = ("llama", "mistral")
_TEXT_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_TOWER_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "num_channels",
)  # fmt: skip
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_config(path: Path) -> Any:
    """config.json as transformers reads it, once it is sure that it can be served; `ModelLoadError` otherwise."""
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        model_type = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"{path / 'config.json'} cannot be read: {error}") from error
    if model_type not in ARCHITECTURES:
        raise ModelLoadError(f"model_type {model_type!r} is not supported: {', '.join(ARCHITECTURES)} are")
    if raw.get("quantization_config"):
        raise ModelLoadError("quantized checkpoints are not supported: give one in float16, bfloat16 or float32")
    try:
        config = AutoConfig.from_pretrained(path)
        _check_model(config)
        max_model_len(None, config.text_config if config.model_type == "llava" else config)
    except ModelLoadError:
        raise
    except Exception as error:  # transformers raises many kinds on a configuration that it does not like
        raise ModelLoadError(f"{path / 'config.json'} cannot be served: {one_line(error)}") from error
    return config


def _check_model(config: Any) -> None:
    text = config
    if config.model_type == "llava":
        text = config.text_config
        if text.model_type not in _TEXT_TYPES:
            raise ModelLoadError(f"a LLaVA around {text.model_type!r} is not supported: {', '.join(_TEXT_TYPES)} are")
        if config.vision_config.model_type != "clip_vision_model":
            raise ModelLoadError(f"vision tower {config.vision_config.model_type!r} is not supported: CLIP is")
        if config.vision_feature_select_strategy not in ("default", "full"):
            raise ModelLoadError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} is not supported"
            )
        _check_sizes(config.vision_config, _TOWER_SIZES)
        if not feature_layers(config):
            raise ModelLoadError("vision_feature_layer is empty: it must name a layer")
        for layer in feature_layers(config):
            resolve_layer(layer, config.vision_config.num_hidden_layers)
        tied = bool(getattr(config, "tie_word_embeddings", False) or text.tie_word_embeddings)
        text.tie_word_embeddings = tied
    _check_sizes(text, _TEXT_SIZES)
    if text.num_attention_heads % text.num_key_value_heads:
        raise ModelLoadError(
            f"num_attention_heads, {text.num_attention_heads}, must be a multiple of num_key_value_heads, "
            f"{text.num_key_value_heads}"
        )
    rope_type(text)


def _check_sizes(config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelLoadError(f"{name} is {value!r}: it must be an integer of at least 1")


def read_generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json; empty where there is none."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error
    return read if isinstance(read, dict) else {}


def eos_token_ids(generation: dict[str, Any], config: Any, text: Any) -> list[int]:
    """Where Hugging Face's `generate` looks for them, in its order."""
    places = (generation.get("eos_token_id"), getattr(config, "eos_token_id", None), text.eos_token_id)
    found: Any = next((eos for eos in places if eos is not None), [])
    ids = list(found) if isinstance(found, list | tuple) else [found]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ModelLoadError(f"eos_token_id is {found!r}: it must be a token id or a list of them")
    return ids


def sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that generation_config.json sets."""
    defaults = {name: generation[name] for name in _SAMPLING_DEFAULTS if generation.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ModelLoadError(f"generation_config.json: {error}") from error
    return defaults


def max_model_len(wanted: int | None, text: Any) -> int:
    """The longest sequence: what is wanted, or what the text configuration says."""
    rope, limit = text.rope_parameters or {}, int(text.max_position_embeddings)
    if rope.get("rope_type") == "linear":
        limit = int(limit * rope["factor"])
    if rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
        limit = max(limit, int(rope["original_max_position_embeddings"] * rope["factor"]))
    if wanted is not None and wanted > limit:
        raise ValueError(f"--max-model-len is {wanted}: the model allows at most {limit}")
    return wanted or limit
