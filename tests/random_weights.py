"""The tensors of a random checkpoint.

Their scales are what makes greedy text vary with the prompt and with the image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from demo.checkpoint_spec import CheckpointSpec
from demo.tokenizer import BYTE_TOKENS
from tests.random_tokenizer import BASE_VOCAB


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
