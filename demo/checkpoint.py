"""Writes checkpoints: folders in the layout that Hugging Face gives LLaVA, Llama and Mistral."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from demo.checkpoint_spec import CheckpointSpec
from demo.tokenizer import BOS, BOS_ID, EOS, EOS_ID, IMAGE, PAD, UNK, special_ids

IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]


def write_configs(folder: Path, spec: CheckpointSpec) -> None:
    """What describes the model and how its images are prepared."""
    eos = spec.eos_token_id
    generation: dict[str, Any] = {
        "bos_token_id": BOS_ID,
        "eos_token_id": eos if isinstance(eos, int) else list(eos),
        "pad_token_id": spec.pad_id,
    }
    if spec.greedy:
        generation["do_sample"], generation["temperature"] = False, 0.0
    _write_json(folder / "generation_config.json", generation)
    if spec.kind != "llava":
        _write_json(folder / "config.json", _text_config(spec))
        return
    _write_json(folder / "config.json", llava_config(spec))
    _write_json(folder / "preprocessor_config.json", preprocessor_config(spec))
    _write_json(folder / "processor_config.json", _processor_config(spec))


def write_tokenizer(folder: Path, spec: CheckpointSpec, tokenizer: Tokenizer, chat_template: str) -> None:
    """The tokenizer, and the chat template where the specification wants it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(spec, chat_template))
    _write_json(folder / "special_tokens_map.json", _special_tokens_map())
    if spec.chat_template_file == "jinja":
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    elif spec.chat_template_file == "json":
        _write_json(folder / "chat_template.json", {"chat_template": chat_template})


def write_weights(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """The tensors in so many files of about the same number of bytes."""
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map: dict[str, str] = {}
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    before = 0
    for name, tensor in tensors.items():
        shard = min(shards - 1, before * shards // total)
        parts[shard][name] = tensor
        before += tensor.nbytes
        weight_map[name] = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
    for shard, part in enumerate(parts):
        save_file(part, folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors", metadata)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _added_token(content: str) -> dict[str, Any]:
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _tokenizer_config(spec: CheckpointSpec, chat_template: str) -> dict[str, Any]:
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(i): {**_added_token(token), "special": True} for token, i in special_ids(spec.base_vocab).items()
        },
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "extra_special_tokens": {"image_token": IMAGE},
        "image_token": IMAGE,
        "legacy": False,
        "model_max_length": spec.max_position_embeddings,
        "pad_token": PAD,
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": UNK,
        "use_default_system_prompt": False,
    }
    if spec.kind == "llava":
        config["processor_class"] = "LlavaProcessor"
    if spec.chat_template_file == "tokenizer":
        config["chat_template"] = chat_template
    return config


def _special_tokens_map() -> dict[str, Any]:
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    return {**{name: _added_token(token) for name, token in named.items()}, "image_token": IMAGE}


def _dtype_entry(spec: CheckpointSpec) -> dict[str, str]:
    # The key was renamed at about the time when the tensors were, so each layout meets the key that it stood beside.
    return {"torch_dtype" if spec.layout == "classic" else "dtype": spec.dtype}


def _text_config(spec: CheckpointSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if spec.language_model == "llama" else "MistralForCausalLM"],
        "model_type": spec.language_model,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": spec.pad_id,
        **_dtype_entry(spec),
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_key_value_heads": spec.num_key_value_heads,
        "rms_norm_eps": 1e-05,
        "rope_parameters": spec.rope,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    if spec.head_dim is not None:
        config["head_dim"] = spec.head_dim
    if spec.language_model == "llama":
        config |= {"attention_bias": spec.attention_bias, "mlp_bias": spec.mlp_bias}
    else:
        config["sliding_window"] = spec.sliding_window
    return config


def _vision_config(spec: CheckpointSpec) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        **_dtype_entry(spec),
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": spec.vision_hidden_size,
        "image_size": spec.image_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * spec.vision_hidden_size,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": spec.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": spec.vision_layers,
        "patch_size": spec.patch_size,
        "projection_dim": spec.vision_hidden_size,
    }


def llava_config(spec: CheckpointSpec) -> dict[str, Any]:
    """The content of config.json."""
    layer = spec.vision_feature_layer
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        **_dtype_entry(spec),
        "ignore_index": -100,
        "image_token_index": spec.image_id,
        "image_seq_length": spec.image_tokens,
        "pad_token_id": spec.pad_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": spec.projector_bias,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "vision_feature_select_strategy": spec.vision_feature_select_strategy,
        "text_config": _text_config(spec),
        "vision_config": _vision_config(spec),
    }


def preprocessor_config(spec: CheckpointSpec) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    config = {
        "crop_size": {"height": spec.image_size, "width": spec.image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": IMAGE_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": IMAGE_STD,
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": spec.image_size},
    }
    if spec.pads_images:
        config |= {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    return config


def _processor_config(spec: CheckpointSpec) -> dict[str, Any]:
    return {
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
        "patch_size": spec.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": spec.vision_feature_select_strategy,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
