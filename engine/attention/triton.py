"""Paged attention on a GPU: requests with one token by one kernel, those with more by another."""

import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.attention.triton_decode import decode_attention
from engine.attention.triton_prefill import prefill_attention
from engine.kernels.triton_ops import rotate_and_store


class TritonAttention:
    """See `AttentionBackend`."""

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
        """See `AttentionBackend.forward`."""
        rotate_and_store(
            qkv, cos, sin, metadata.rotary_rows, cache, metadata.token_rows, metadata.positions, metadata.block_table,
            kv_scales,
        )  # fmt: skip
        tokens, heads, head_dim = qkv.shape
        query = qkv[:, : heads - 2 * cache.shape[3]]
        output = torch.empty(tokens, query.shape[1], head_dim, dtype=qkv.dtype, device=qkv.device)
        window = sliding_window or 0
        if metadata.num_decodes:
            decode_attention(query, cache, output, metadata, scale=scale, window=window, kv_scales=kv_scales)
        if metadata.tiles.shape[1]:
            prefill_attention(query, cache, output, metadata, scale=scale, window=window, kv_scales=kv_scales)
        return output
