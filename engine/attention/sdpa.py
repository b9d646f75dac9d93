"""Paged attention with torch's scaled_dot_product_attention: for the CPU, and the reference for kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import AttentionMetadata, write_kv


class SDPAttention:
    """Gathers each sequence's keys and values, then attends, one request after the other."""

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
        """See `AttentionBackend.forward`."""
        write_kv(key, value, cache, metadata.slot_mapping)
        output = torch.empty_like(query)
        block_size = cache.shape[2]
        for i, seq_len in enumerate(metadata.seq_lens):
            start, end = metadata.query_start[i], metadata.query_start[i + 1]
            first = 0 if sliding_window is None else max(0, seq_len - (end - start) - sliding_window + 1)
            first_block = first // block_size
            blocks = metadata.block_table[i, first_block : -(-seq_len // block_size)]
            first = first_block * block_size
            keys, values = cache[:, blocks].flatten(1, 2)[:, : seq_len - first].transpose(1, 2)
            output[start:end] = _attend(
                query[start:end], keys, values, first=first, seq_len=seq_len, scale=scale, window=sliding_window
            )
        return output


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, *, first: int, seq_len: int, scale: float, window: int | None
) -> Tensor:
    """Attend with the last tokens of one sequence, (tokens, heads, head_dim), to keys from position `first` on."""
    num_tokens = query.shape[0]
    mask = None
    if num_tokens > 1 or window is not None:
        rows = torch.arange(seq_len - num_tokens, seq_len).unsqueeze(1)
        columns = torch.arange(first, seq_len).unsqueeze(0)
        mask = columns <= rows
        if window is not None:
            mask &= columns > rows - window
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[0],
    )
    return attended.squeeze(0).transpose(0, 1)
