"""Small seeded random checkpoints in the layout of Hugging Face LLaVA, Llama and Mistral folders.

    python -m demo.random_checkpoint --out DIR [--seed N]

The weights mean nothing. They are scaled so that greedy decoding has clear margins and its text varies with the prompt
and with the image, which is what tests and examples need of a model that is made in a second.
"""

import argparse
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo.random_tokenizer import (
    BASE_VOCAB,
    BOS,
    BOS_ID,
    BYTE_TOKENS,
    EOS,
    EOS_ID,
    IMAGE,
    IMAGE_ID,
    PAD,
    PAD_ID,
    SPECIAL_IDS,
    TOKENIZER_SIZE,
    UNK,
    build_tokenizer,
)

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


@dataclass(frozen=True)
class CheckpointSpec:
    """What to build; the defaults are a two-layer LLaVA whose image is 16 tokens."""

    seed: int = 0
    kind: Literal["llava", "llama", "mistral"] = "llava"
    text_model: Literal["llama", "mistral"] = "llama"
    """The language model of a `llava`; the other kinds are text-only and are what their name says."""

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int | None = None
    vocab_size: int = -(-TOKENIZER_SIZE // 64) * 64
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: dict[str, Any] | None = field(default=None, hash=False)
    max_position_embeddings: int = 2048
    sliding_window: int | None = None

    vision_hidden_size: int = 32
    vision_layers: int = 3
    vision_heads: int = 2
    image_size: int = 56
    patch_size: int = 14
    vision_feature_layer: int | tuple[int, ...] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    projector_bias: bool = True

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    shards: int = 1
    layout: Literal["classic", "new", "flat_clip"] = "classic"
    """How the keys of a `llava` are named; see `KEY_LAYOUTS`."""
    legacy_buffers: bool = False
    """Store the buffers `position_ids` and `inv_freq` that checkpoints of old library versions hold."""
    chat_template_file: Literal["jinja", "json", "tokenizer"] | None = "jinja"
    eos_token_id: int | tuple[int, ...] = EOS_ID
    """What generation_config.json names. Greedy decoding never picks `</s>` itself: name another id to see an end."""

    def __post_init__(self) -> None:
        if self.language_model == "mistral" and (self.attention_bias or self.mlp_bias):
            raise ValueError("a mistral has no attention_bias and no mlp_bias")
        if self.language_model == "llama" and self.sliding_window is not None:
            raise ValueError("a llama has no sliding_window")
        if self.vocab_size < TOKENIZER_SIZE:
            raise ValueError(f"vocab_size {self.vocab_size} is below the tokenizer's {TOKENIZER_SIZE}")
        if self.shards < 1:
            raise ValueError(f"shards must be at least 1, not {self.shards}")

    @property
    def language_model(self) -> Literal["llama", "mistral"]:
        """The architecture of the language model, whatever the kind."""
        return self.text_model if self.kind == "llava" else self.kind

    @property
    def size_of_head(self) -> int:
        """The width of one attention head of the language model."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def image_tokens(self) -> int:
        """How many prompt tokens one image takes."""
        patches = (self.image_size // self.patch_size) ** 2
        return patches + (self.vision_feature_select_strategy == "full")

    @property
    def rope(self) -> dict[str, Any]:
        """The rope parameters as the configuration file states them."""
        return self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}


class KeyLayout(NamedTuple):
    """The prefixes that tensor names have in a checkpoint file."""

    text: str
    lm_head: str
    projector: str = ""
    vision: str = ""


TEXT_ONLY_KEYS = KeyLayout("model.", "lm_head.weight")
KEY_LAYOUTS = {
    "classic": KeyLayout(
        "language_model.model.", "language_model.lm_head.weight", "multi_modal_projector.", "vision_tower.vision_model."
    ),
    "new": KeyLayout(
        "model.language_model.", "lm_head.weight", "model.multi_modal_projector.", "model.vision_tower.vision_model."
    ),
    "flat_clip": KeyLayout(
        "model.language_model.", "lm_head.weight", "model.multi_modal_projector.", "model.vision_tower."
    ),
}


class _Weights:
    """Collects named random tensors, drawn from one generator in the order of the calls."""

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> Tensor:
        tensor = torch.randn(*shape, generator=self._generator) * std + mean
        self.tensors[name] = tensor
        return tensor

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool, gain: float = 1.0) -> None:
        self.normal(f"{name}.weight", outputs, inputs, std=gain * inputs**-0.5)
        if bias:
            self.normal(f"{name}.bias", outputs, std=0.1)

    def norm(self, name: str, size: int, *, bias: bool) -> None:
        self.normal(f"{name}.weight", size, std=0.1, mean=1.0)
        if bias:
            self.normal(f"{name}.bias", size, std=0.1)


# Sharp attention: with an even one every long prompt would average out to the same text.
ATTENTION_GAIN = 1.7
LOGIT_GAIN = 3.0


def _add_vision_tower(weights: _Weights, prefix: str, spec: CheckpointSpec) -> None:
    size, patch = spec.vision_hidden_size, spec.patch_size
    positions = (spec.image_size // patch) ** 2 + 1
    weights.normal(f"{prefix}embeddings.class_embedding", size, std=1.0)
    weights.normal(f"{prefix}embeddings.patch_embedding.weight", size, 3, patch, patch, std=(3 * patch * patch) ** -0.5)
    weights.normal(f"{prefix}embeddings.position_embedding.weight", positions, size, std=0.3)
    weights.norm(f"{prefix}pre_layrnorm", size, bias=True)  # the spelling of every CLIP checkpoint
    for layer in range(spec.vision_layers):
        block = f"{prefix}encoder.layers.{layer}."
        for name, gain in (("q", ATTENTION_GAIN), ("k", ATTENTION_GAIN), ("v", 1.0), ("out", 1.0)):
            weights.linear(f"{block}self_attn.{name}_proj", size, size, bias=True, gain=gain)
        weights.norm(f"{block}layer_norm1", size, bias=True)
        weights.linear(f"{block}mlp.fc1", 4 * size, size, bias=True)
        weights.linear(f"{block}mlp.fc2", size, 4 * size, bias=True, gain=2.0)
        weights.norm(f"{block}layer_norm2", size, bias=True)
    weights.norm(f"{prefix}post_layernorm", size, bias=True)
    if spec.legacy_buffers:
        weights.tensors[f"{prefix}embeddings.position_ids"] = torch.arange(positions).unsqueeze(0)


def _add_projector(weights: _Weights, prefix: str, spec: CheckpointSpec) -> None:
    layers = 1 if isinstance(spec.vision_feature_layer, int) else len(spec.vision_feature_layer)
    inputs, bias = spec.vision_hidden_size * layers, spec.projector_bias
    weights.linear(f"{prefix}linear_1", spec.hidden_size, inputs, bias=bias)
    weights.linear(f"{prefix}linear_2", spec.hidden_size, spec.hidden_size, bias=bias)


def _loudness(vocab_size: int) -> Tensor:
    """The scale of each row of the output head.

    Special tokens and the rows that no token has are never picked, so that text flows until it is told to stop. Bytes
    are picked now and then: enough to meet characters that are not whole, too few to make the text unreadable.
    """
    scale = torch.full((vocab_size,), 0.05)
    scale[len(BYTE_TOKENS) + 3 : BASE_VOCAB] = 1.0
    scale[3 : len(BYTE_TOKENS) + 3] = 0.75
    return scale.unsqueeze(1)


def _add_language_model(weights: _Weights, keys: KeyLayout, spec: CheckpointSpec) -> None:
    size, inner, head = spec.hidden_size, spec.intermediate_size, spec.size_of_head
    queries, key_values = spec.num_attention_heads * head, spec.num_key_value_heads * head
    bias = spec.attention_bias
    embedding = weights.normal(f"{keys.text}embed_tokens.weight", spec.vocab_size, size, std=LOGIT_GAIN * size**-0.5)
    if spec.tie_word_embeddings:
        embedding *= _loudness(spec.vocab_size)
    for layer in range(spec.num_hidden_layers):
        block = f"{keys.text}layers.{layer}."
        weights.linear(f"{block}self_attn.q_proj", queries, size, bias=bias, gain=ATTENTION_GAIN)
        weights.linear(f"{block}self_attn.k_proj", key_values, size, bias=bias, gain=ATTENTION_GAIN)
        weights.linear(f"{block}self_attn.v_proj", key_values, size, bias=bias)
        weights.linear(f"{block}self_attn.o_proj", size, queries, bias=bias, gain=2.0)
        weights.linear(f"{block}mlp.gate_proj", inner, size, bias=spec.mlp_bias, gain=2.0)
        weights.linear(f"{block}mlp.up_proj", inner, size, bias=spec.mlp_bias)
        weights.linear(f"{block}mlp.down_proj", size, inner, bias=spec.mlp_bias, gain=2.0)
        weights.norm(f"{block}input_layernorm", size, bias=False)
        weights.norm(f"{block}post_attention_layernorm", size, bias=False)
        if spec.legacy_buffers:
            exponents = torch.arange(0, head, 2, dtype=torch.float32) / head
            weights.tensors[f"{block}self_attn.rotary_emb.inv_freq"] = spec.rope["rope_theta"] ** -exponents
    weights.norm(f"{keys.text}norm", size, bias=False)
    if not spec.tie_word_embeddings:
        output = weights.normal(keys.lm_head, spec.vocab_size, size, std=LOGIT_GAIN * size**-0.5)
        output *= _loudness(spec.vocab_size)


def state_dict(spec: CheckpointSpec) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names that its layout gives them."""
    weights = _Weights(spec.seed)
    keys = KEY_LAYOUTS[spec.layout] if spec.kind == "llava" else TEXT_ONLY_KEYS
    if spec.kind == "llava":
        _add_vision_tower(weights, keys.vision, spec)
        _add_projector(weights, keys.projector, spec)
    _add_language_model(weights, keys, spec)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights.tensors.items()}


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
