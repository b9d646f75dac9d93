"""Small seeded random checkpoints in the layout of Hugging Face LLaVA, Llama and Mistral folders.

    python -m demo.random_checkpoint --out DIR [--seed N]

The weights mean nothing. They are scaled so that greedy decoding has clear margins and its text varies with the prompt
and with the image, which is what tests and examples need of a model that is made in a second.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from demo.checkpoint_spec import CheckpointSpec
from demo.checkpoint_weights import state_dict
from demo.random_tokenizer import (
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    IMAGE,
    IMAGE_ID,
    PAD,
    PAD_ID,
    SPECIAL_IDS,
    UNK,
    build_tokenizer,
)

__all__ = ["CheckpointSpec", "build_checkpoint"]

IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if message['role'] != 'system' -%}{{- message['role'] | upper ~ ': ' -}}{%- endif -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{{- '<image>\\n' * (content | selectattr('type', 'in', ['image', 'image_url']) | list | length) -}}
{{- content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -}}
{%- endif -%}
{{- '</s>' if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def _added_token(content: str) -> dict[str, Any]:
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _tokenizer_config(spec: CheckpointSpec) -> dict[str, Any]:
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {**_added_token(token), "special": True} for token, i in SPECIAL_IDS.items()},
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
        config["chat_template"] = CHAT_TEMPLATE
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
        "pad_token_id": PAD_ID,
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


def _llava_config(spec: CheckpointSpec) -> dict[str, Any]:
    layer = spec.vision_feature_layer
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        **_dtype_entry(spec),
        "ignore_index": -100,
        "image_token_index": IMAGE_ID,
        "image_seq_length": spec.image_tokens,
        "pad_token_id": PAD_ID,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": spec.projector_bias,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "vision_feature_select_strategy": spec.vision_feature_select_strategy,
        "text_config": _text_config(spec),
        "vision_config": _vision_config(spec),
    }


def _preprocessor_config(spec: CheckpointSpec) -> dict[str, Any]:
    return {
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


def _write_configs(folder: Path, spec: CheckpointSpec) -> None:
    eos = spec.eos_token_id
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": eos if isinstance(eos, int) else list(eos),
        "pad_token_id": PAD_ID,
    }
    _write_json(folder / "generation_config.json", generation)
    if spec.kind != "llava":
        _write_json(folder / "config.json", _text_config(spec))
        return
    _write_json(folder / "config.json", _llava_config(spec))
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(spec))
    _write_json(folder / "processor_config.json", _processor_config(spec))


def _write_tokenizer(folder: Path, spec: CheckpointSpec) -> None:
    build_tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(spec))
    _write_json(folder / "special_tokens_map.json", _special_tokens_map())
    if spec.chat_template_file == "jinja":
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    elif spec.chat_template_file == "json":
        _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write_weights(folder: Path, spec: CheckpointSpec) -> None:
    tensors = state_dict(spec)
    metadata = {"format": "pt"}
    if spec.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(spec.shards):
        file_name = f"model-{shard + 1:05d}-of-{spec.shards:05d}.safetensors"
        part = names[shard * len(names) // spec.shards : (shard + 1) * len(names) // spec.shards]
        save_file({name: tensors[name] for name in part}, folder / file_name, metadata)
        weight_map |= dict.fromkeys(part, file_name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def build_checkpoint(folder: Path, spec: CheckpointSpec = CheckpointSpec()) -> Path:
    """Write a whole checkpoint to `folder` and return it.

    The folder appears complete or not at all. It must not exist yet, or be empty: nothing is overwritten.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        # One level deeper, because the temporary folder itself is closed to other users.
        draft = Path(work, folder.name)
        draft.mkdir()
        _write_configs(draft, spec)
        _write_tokenizer(draft, spec)
        _write_weights(draft, spec)
        os.replace(draft, folder)
    return folder


def main() -> None:
    """Build the default checkpoint in the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Build a small random LLaVA checkpoint, for tests and examples.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    args = parser.parse_args()
    try:
        folder = build_checkpoint(args.out, CheckpointSpec(seed=args.seed))
    except OSError as error:
        parser.error(str(error))
    print(f"wrote a random LLaVA checkpoint (seed {args.seed}) to {folder}")


if __name__ == "__main__":
    main()
