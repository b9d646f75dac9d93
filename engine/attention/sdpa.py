"""Paged attention for the CPU, and the reference for kernels."""

import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.kernels.cpu_features import runs_compiled
from engine.kernels.torch_ops import attend, rotate

if runs_compiled():
    from engine.attention import cpu_decode
    from engine.kernels import cpu_ops


class SDPAttention:
    """Requests with one token read the cache where it lies, all together; of each other one keys and values are
    gathered for torch's scaled_dot_product_attention, one request after the other.
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
        """See `AttentionBackend.forward`."""
        block_size, kv_heads = cache.shape[2:4]
        is_compiled = runs_compiled() and cache.dtype == qkv.dtype and cpu_decode.works_on(cache)
        if is_compiled:
            cpu_ops.rotate_and_store(
                qkv, cos, sin, metadata.rotary_rows, cache, metadata.token_rows, metadata.positions,
                metadata.block_table,
            )  # fmt: skip
            query = qkv[:, : qkv.shape[1] - 2 * kv_heads]
        else:
            query = _rotate_and_store(qkv, cos, sin, cache, metadata, kv_scales)
        if kv_scales is not None:
            # What is read stays divided: multiplying queries and results is the same, and far less to multiply.
            kv_scales = kv_scales.repeat_interleave(query.shape[1] // kv_heads, dim=1).unsqueeze(-1)
            query.mul_(kv_scales[0])
        output = torch.empty_like(query)
        decodes = _decodes(metadata) if is_compiled else []
        if decodes:
            _decode(query, output, cache, metadata, decodes, scale=scale, window=sliding_window)
        for i, seq_len in enumerate(metadata.seq_lens):
            start, end = metadata.query_start[i], metadata.query_start[i + 1]
            if decodes and end - start == 1:
                continue
            first = 0 if sliding_window is None else max(0, seq_len - (end - start) - sliding_window + 1)
            first_block = first // block_size
            blocks = metadata.block_table[metadata.rows[i], first_block : -(-seq_len // block_size)]
            first = first_block * block_size
            gathered = _bits(cache).index_select(1, blocks).view(cache.dtype)
            keys, values = gathered.flatten(1, 2)[:, : seq_len - first].transpose(1, 2)
            output[start:end] = _attend(
                query[start:end], keys, values, first=first, seq_len=seq_len, scale=scale, window=sliding_window
            )
        return output if kv_scales is None else output.mul_(kv_scales[1])


def _rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, metadata: AttentionMetadata, kv_scales: Tensor | None
) -> Tensor:
    """Returns the rotated queries (T, heads, head_dim)."""
    kv_heads = cache.shape[3]
    query, key, value = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cos, sin = (table[metadata.rotary_rows].unsqueeze(1) for table in (cos, sin))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    if kv_scales is not None:
        key, value = (_to_fp8(x, some) for x, some in zip((key, value), kv_scales, strict=True))
    _write(key, value, cache, metadata)
    return query


def _decodes(metadata: AttentionMetadata) -> list[int]:
    """The requests with one token."""
    return [i for i, start in enumerate(metadata.query_start[:-1]) if metadata.query_start[i + 1] == start + 1]


def _decode(
    query: Tensor,
    output: Tensor,
    cache: Tensor,
    metadata: AttentionMetadata,
    decodes: list[int],
    *,
    scale: float,
    window: int | None,
) -> None:
    places = torch.tensor([metadata.query_start[i] for i in decodes])
    rows = torch.tensor([metadata.rows[i] for i in decodes])
    ends = torch.tensor([metadata.seq_lens[i] for i in decodes])
    firsts = torch.zeros_like(ends) if window is None else (ends - window).clamp(min=0)
    output[places] = cpu_decode.decode_attention(
        query[places], cache, metadata.block_table, rows, firsts, ends, scale=scale
    )


def _to_fp8(x: Tensor, scales: Tensor) -> Tensor:
    """(T, kv_heads, head_dim) divided by its heads' scales (kv_heads); what is too large becomes the largest number,
    since e4m3 has no infinity.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scales.unsqueeze(-1)).clamp(-largest, largest).to(torch.float8_e4m3fn)


def _bits(x: Tensor) -> Tensor:
    """The same memory in a type that torch can index: of fp8 it can only convert the numbers."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _write(key: Tensor, value: Tensor, cache: Tensor, metadata: AttentionMetadata) -> None:
    """Put each token's key and value (T, kv_heads, head_dim) into its place."""
    block_size = cache.shape[2]
    blocks = metadata.block_table[metadata.token_rows, metadata.positions // block_size]
    places = blocks.long() * block_size + metadata.positions % block_size
    flat = _bits(cache).flatten(1, 2)
    flat[0].index_copy_(0, places, _bits(key))
    flat[1].index_copy_(0, places, _bits(value))


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, *, first: int, seq_len: int, scale: float, window: int | None
) -> Tensor:
    """Attend with the last tokens of one sequence, (tokens, heads, head_dim), to keys from position `first` on."""
    num_tokens = query.shape[0]
    mask, is_causal = None, False
    if num_tokens == seq_len and (window is None or window >= seq_len):
        is_causal = True  # torch then leaves out part of what no token sees
    elif num_tokens > 1 or window is not None:
        rows = torch.arange(seq_len - num_tokens, seq_len).unsqueeze(1)
        columns = torch.arange(first, seq_len).unsqueeze(0)
        mask = columns <= rows
        if window is not None:
            mask &= columns > rows - window
    heads_first = query.transpose(0, 1).unsqueeze(0)
    attended = attend(heads_first, keys.unsqueeze(0), values.unsqueeze(0), mask=mask, is_causal=is_causal, scale=scale)
    return attended.squeeze(0).transpose(0, 1)
