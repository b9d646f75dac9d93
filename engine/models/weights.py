"""What checkpoints call their tensors, and where each goes in our fused modules."""

import re
from typing import NamedTuple

# Checkpoints name the same parts in three ways, by the version of transformers that saved them. A text-only
# checkpoint's `model.` is the language model. First match wins; the order is by length.
_PREFIXES = (
    ("model.language_model.", "language_model."),
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("model.", "language_model."),
)

# Buffers that old versions saved; they follow from the configuration.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
_VISION_LAYER = re.compile(r"^vision_tower\.encoder\.layers\.(\d+)\.")


class Target(NamedTuple):
    """A parameter, and which of the parts fused in it a tensor is."""

    parameter: str
    part: int | None = None


_FUSED = {
    ".q_proj.": (".qkv_proj.", 0),
    ".k_proj.": (".qkv_proj.", 1),
    ".v_proj.": (".qkv_proj.", 2),
    ".gate_proj.": (".gate_up_proj.", 0),
    ".up_proj.": (".gate_up_proj.", 1),
}


def canonical_name(name: str) -> str:
    """A checkpoint's tensor name in our modules' terms, fused parts not yet joined."""
    for old, new in _PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def is_unneeded(name: str, vision_layers: int | None) -> bool:
    """Whether a canonical name is rightly left unloaded.

    Args:
        name: the canonical name.
        vision_layers: layers of the vision tower that are run; None when there is no tower.
    """
    if _BUFFERS.search(name):
        return True
    if not name.startswith("vision_tower."):
        return False
    if vision_layers is None or name.startswith("vision_tower.post_layernorm."):
        return True
    layer = _VISION_LAYER.match(name)
    return layer is not None and int(layer[1]) >= vision_layers


def target(name: str) -> Target:
    """Where the tensor of a canonical name goes."""
    if name.startswith("vision_tower.encoder."):
        name = name.replace(".encoder.", ".", 1)
    for old, (new, part) in _FUSED.items():
        if old in name:
            return Target(name.replace(old, new), part)
    return Target(name)
