"""The attention seam: what a model asks of paged attention, and who answers it on which device."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Where this step's tokens stand in their sequences and in the cache. `T` tokens of `R` requests, back to back."""

    query_start: list[int]
    """(R + 1) Index of each request's first token in the batch; the last entry is T."""
    seq_lens: list[int]
    """(R) Tokens of each sequence, this step's counted in."""
    query_start_dev: Tensor
    """`query_start` on the device, int32."""
    seq_lens_dev: Tensor
    """`seq_lens` on the device, int32."""
    block_table: Tensor
    """(R, blocks) int32: the cache blocks of each sequence, in order."""
    slot_mapping: Tensor
    """(T) int64: block * block_size + offset, where each token's key and value go."""


class AttentionBackend(Protocol):
    """Paged causal attention over one layer's cache, (2, blocks, block_size, kv_heads, head_dim), keys first."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Write `key` and `value` (T, kv_heads, head_dim) to the cache, then attend with `query` (T, heads, head_dim).

        Every key of the step is written before any is read, so that requests of one step may share blocks.
        """
        ...


def write_kv(key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Put each token's key and value (T, kv_heads, head_dim) into its slot."""
    flat = cache.flatten(1, 2)
    flat[0].index_copy_(0, slot_mapping, key)
    flat[1].index_copy_(0, slot_mapping, value)


def attention_backend(device: torch.device) -> AttentionBackend:
    """The implementation for a device."""
    if device.type == "cuda":
        from engine.attention.triton import (
            TritonAttention,  # triton is installed with CUDA builds of torch only
        )

        return TritonAttention()
    from engine.attention.sdpa import SDPAttention

    return SDPAttention()
