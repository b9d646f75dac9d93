"""Rotary position embedding (Su et al., 2021) and the ways in which LlamaConfig stretches it."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SUPPORTED = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def rope_type(config: Any) -> str:
    """The kind of scaling that a text configuration asks for; `ValueError` when it cannot be served."""
    parameters = config.rope_parameters or {}
    kind = str(parameters.get("rope_type", "default"))
    if kind not in SUPPORTED:
        raise ValueError(f"rope_type {kind!r} is not supported: {', '.join(SUPPORTED)} are")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor below 1 is not supported")
    return kind


def long_context_start(config: Any) -> int | None:
    """Length above which longrope takes its long factors; None for every other kind."""
    if rope_type(config) != "longrope":
        return None
    return int(config.rope_parameters["original_max_position_embeddings"])


class RotaryEmbedding:
    """Tables of cosines and sines in the model's dtype, (positions, head_dim / 2).

    With longrope the table is made twice: rows from `max_len` on are those of the long factors.
    """

    def __init__(self, config: Any, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        lengths = [1] if long_context_start(config) is None else [1, config.max_position_embeddings + 1]
        tables = [_angles(config, length, max_len) for length in lengths]
        self.cos = torch.cat([cos for cos, _ in tables]).to(device, dtype)
        self.sin = torch.cat([sin for _, sin in tables]).to(device, dtype)


def _angles(config: Any, seq_len: int, max_len: int) -> tuple[Tensor, Tensor]:
    kind = rope_type(config)
    cpu = torch.device("cpu")
    if kind == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies, scale = 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0
    else:
        # Within max_position_embeddings, `dynamic` is the same as no scaling: it is never asked for more.
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, cpu, seq_len=seq_len)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies.float())
    return angles.cos() * scale, angles.sin() * scale
