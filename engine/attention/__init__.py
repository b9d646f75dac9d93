"""The attention seam: what a model asks of paged attention, and who answers it on which device."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Where this step's tokens stand in their sequences and in the cache.

    `T` tokens of `R` requests, back to back. Requests with one token come first; there are `num_decodes` of them.
    """

    num_decodes: int
    query_start: list[int]
    """(R + 1) Index of each request's first token in the batch; the last entry is T."""
    seq_lens: list[int]
    """(R) Tokens of each sequence, this step's counted in."""
    rows: list[int]
    """(R) The requests' rows of the block table."""
    token_rows: Tensor
    """(T) int32 each token's row of the block table."""
    positions: Tensor
    """(T) int32 each token's index in its sequence."""
    rotary_rows: Tensor
    """(T) int32 each token's row of the rotary tables."""
    block_table: Tensor
    """(slots, blocks) int32: the cache blocks of each slot's sequence, in order."""
    prefills: Tensor
    """(4, R - num_decodes) int32 of the requests with more tokens: index of the first one, their number, length of the
    sequence, row of the block table."""


class AttentionBackend(Protocol):
    """Paged causal attention over one layer's cache, (2, blocks, block_size, kv_heads, head_dim), keys first."""

    def forward(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Rotate queries and keys, write keys and values to the cache, attend.

        Every key of the step is written before any is read, so that requests of one step may share blocks.

        Args:
            qkv: (T, heads + 2 * kv_heads, head_dim) queries, keys and values; may be changed.
            cos: table of cosines, (angles, head_dim / 2).
            sin: table of sines.
            cache: the layer's.
            metadata: of the step.
            scale: of the scores.
            sliding_window: how many positions a token sees, its own counted in; None: all before it.

        Returns:
            (T, heads, head_dim).
        """
        ...


def attention_backend(device: torch.device) -> AttentionBackend:
    """The implementation for a device."""
    if device.type == "cuda":
        from engine.attention.triton import (
            TritonAttention,  # triton is installed with CUDA builds of torch only
        )

        return TritonAttention()
    from engine.attention.sdpa import SDPAttention

    return SDPAttention()
