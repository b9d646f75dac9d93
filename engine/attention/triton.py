"""Paged attention as one Triton kernel for prefill, chunks and decode alike, by online softmax (FlashAttention)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention import AttentionMetadata, write_kv


@triton.jit  # type: ignore[untyped-decorator]
def _paged_attention(  # type: ignore[no-untyped-def]
    query, cache, output, query_start, seq_lens, block_table,
    scale, value_offset, query_stride, block_stride, slot_stride, table_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` (token, head of the group) pairs of one request and one key-value head."""
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    first_row = tl.program_id(2) * ROWS
    start = tl.load(query_start + request)
    num_tokens = tl.load(query_start + request + 1) - start
    if first_row >= num_tokens * GROUP:
        return
    seq_len = tl.load(seq_lens + request)
    rows = first_row + tl.arange(0, ROWS)
    tokens = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, HEAD_PAD)
    row_mask = (tokens < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    row_offsets = (start + tokens)[:, None].to(tl.int64) * query_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(query + row_offsets, mask=row_mask, other=0.0)
    positions = seq_len - num_tokens + tokens

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    last_token = tl.minimum((first_row + ROWS - 1) // GROUP, num_tokens - 1)
    end = seq_len - num_tokens + last_token + 1
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(seq_len - num_tokens + first_row // GROUP - WINDOW + 1, 0) // COLUMNS * COLUMNS
    for column in range(begin, end, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        in_range = columns < end
        blocks = tl.load(block_table + request * table_stride + columns // BLOCK_SIZE, mask=in_range, other=0)
        slots = blocks.to(tl.int64) * block_stride + (columns % BLOCK_SIZE) * slot_stride + kv_head * HEAD_DIM
        kv_mask = in_range[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(cache + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = columns[None, :] <= positions[:, None]
        if WINDOW > 0:
            seen &= columns[None, :] > positions[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        newest = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen no key yet keeps -inf; it must not become NaN.
        safe = tl.where(newest == float("-inf"), 0.0, newest)
        weights = tl.exp(scores - safe[:, None])
        decay = tl.exp(best - safe)
        total = total * decay + tl.sum(weights, 1)
        v = tl.load(cache + value_offset + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        best = newest
    acc = acc / total[:, None]
    tl.store(output + row_offsets, acc.to(output.dtype.element_ty), mask=row_mask)


class TritonAttention:
    """The first GPU implementation: correct for every shape, not yet split over long sequences."""

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
        query = query.contiguous()
        output = torch.empty_like(query)
        _, heads, head_dim = query.shape
        kv_heads = cache.shape[3]
        group = heads // kv_heads
        longest = max(b - a for a, b in zip(metadata.query_start, metadata.query_start[1:], strict=False))
        exact = query.dtype == torch.float32
        rows = 16 if longest * group <= 16 else (32 if exact else 64)
        grid = (len(metadata.seq_lens), kv_heads, triton.cdiv(longest * group, rows))
        _paged_attention[grid](
            query, cache, output, metadata.query_start_dev, metadata.seq_lens_dev, metadata.block_table,
            scale, cache.stride(0), query.stride(0), cache.stride(1), cache.stride(2), metadata.block_table.stride(0),
            GROUP=group, HEAD_DIM=head_dim, HEAD_PAD=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_SIZE=cache.shape[2], ROWS=rows, COLUMNS=32 if exact else 64, WINDOW=sliding_window or 0,
            PRECISION="ieee" if exact else "tf32", num_warps=4,
        )  # fmt: skip
        return output
