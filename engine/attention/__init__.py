"""The attention seam: what a model asks of paged attention, and who answers it on which device."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Where this step's tokens stand in their sequences and in the cache.

    `T` tokens of `R` requests, back to back. Requests with one token come first; there are `num_decodes` of them. The
    others, `P` in number, are cut into tiles of tokens.
    """

    num_decodes: int
    """With `counts`: at most."""
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
    """(4, P or more) int32 of the requests with more tokens: index of the first one, their number, length of the
    sequence, row of the block table."""
    tiles: Tensor
    """(2, tiles or more) int32 which of the `prefills`, and the index of the tile's first token among its tokens."""
    counts: Tensor | None = None
    """(2) int32 decodes and tiles, where a CUDA graph needs them on the device; None: the tensors' sizes tell."""
    shared: Tensor | None = None
    """(3) int32: how many of the first decodes begin with the same cache blocks, how many tokens these hold, and a row
    of the block table that names them. None: nobody looked."""


class AttentionBackend(Protocol):
    """Paged causal attention over one layer's cache, (2, blocks, block_size, kv_heads, head_dim), keys first.

    A cache in fp8 (e4m3) holds each key and value divided by its head's scale.
    """

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
        kv_scales: Tensor | None,
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
            kv_scales: (2, kv_heads) float32 of an fp8 cache's keys and values; None: the cache is of the queries' type.

        Returns:
            (T, heads, head_dim).
        """
        ...


def tile_tokens(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> int:
    """Tokens of a tile: as many as fill a tensor core's rows together with the query heads that share a key."""
    rows = 32 if dtype == torch.float32 else 64
    return max(1, rows * num_kv_heads // num_heads)


def attention_backend(device: torch.device) -> AttentionBackend:
    """The implementation for a device."""
    if device.type == "cuda":
        from engine.attention.triton import (
            TritonAttention,  # triton is installed with CUDA builds of torch only
        )

        return TritonAttention()
    from engine.attention.sdpa import SDPAttention

    return SDPAttention()
