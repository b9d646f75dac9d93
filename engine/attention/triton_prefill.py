"""Attention of requests with several tokens, as one Triton kernel by online softmax (Dao et al., 2022)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention import AttentionMetadata, tile_tokens
from engine.attention.programs import num_programs
from engine.attention.triton_fp8 import for_products, scale_at
from engine.kernels.overlap import overlap, wait_for_inputs


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tile(  # type: ignore[no-untyped-def]
    tile, kv_head, query, cache, output, prefills, tiles, block_table, kv_scales,
    scale, value_offset, query_stride, output_stride, block_stride, slot_stride, table_stride, prefill_stride,
    tile_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend with the (token, head of the group) pairs of one tile and one key-value head."""
    request = tl.load(tiles + tile)
    first = tl.load(tiles + tile_stride + tile)
    start = tl.load(prefills + request)
    num_tokens = tl.load(prefills + prefill_stride + request)
    seq_len = tl.load(prefills + 2 * prefill_stride + request)
    table = block_table + tl.load(prefills + 3 * prefill_stride + request).to(tl.int64) * table_stride
    rows = tl.arange(0, ROWS)
    tokens = first + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, HEAD_PAD)
    row_mask = ((rows < TOKENS * GROUP) & (tokens < num_tokens))[:, None] & (dims < HEAD_DIM)[None, :]
    in_head = heads[:, None] * HEAD_DIM + dims[None, :]
    places = (start + tokens)[:, None].to(tl.int64)
    q = for_products(tl.load(query + places * query_stride + in_head, mask=row_mask, other=0.0), kv_scales)
    scale *= scale_at(kv_scales, kv_head)
    positions = seq_len - num_tokens + tokens

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    last_token = tl.minimum(first + TOKENS, num_tokens) - 1
    end = seq_len - num_tokens + last_token + 1
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(seq_len - num_tokens + first - WINDOW + 1, 0) // COLUMNS * COLUMNS
    for column in range(begin, end, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        in_range = columns < end
        blocks = tl.load(table + columns // BLOCK_SIZE, mask=in_range, other=0)
        slots = blocks.to(tl.int64) * block_stride + (columns % BLOCK_SIZE) * slot_stride + kv_head * HEAD_DIM
        kv_mask = in_range[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(cache + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0).to(q.dtype)
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
        v = tl.load(cache + value_offset + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0).to(q.dtype)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        best = newest
    acc = acc / total[:, None] * scale_at(kv_scales, KV_HEADS + kv_head)
    tl.store(output + places * output_stride + in_head, acc.to(output.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["num_tiles", "prefill_stride", "tile_stride"])  # type: ignore[untyped-decorator]
def _prefill(  # type: ignore[no-untyped-def]
    query, cache, output, prefills, tiles, counts, block_table, kv_scales, num_tiles,
    scale, value_offset, query_stride, output_stride, block_stride, slot_stride, table_stride, prefill_stride,
    tile_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, COUNTED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program takes one pair of a tile and a key-value head after the other."""
    wait_for_inputs(OVERLAP)
    if COUNTED:
        num_tiles = tl.load(counts + 1)
    for item in range(tl.program_id(0), num_tiles * KV_HEADS, tl.num_programs(0)):
        _attend_tile(
            item // KV_HEADS, item % KV_HEADS, query, cache, output, prefills, tiles, block_table, kv_scales,
            scale, value_offset, query_stride, output_stride, block_stride, slot_stride, table_stride, prefill_stride,
            tile_stride, KV_HEADS, GROUP, TOKENS, ROWS, HEAD_DIM, HEAD_PAD, BLOCK_SIZE, COLUMNS, WINDOW, PRECISION,
        )  # fmt: skip


def prefill_attention(
    query: Tensor,
    cache: Tensor,
    output: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int,
    kv_scales: Tensor | None,
) -> None:
    """Attend for the requests behind the first `num_decodes`.

    Args:
        query: (T, heads, head_dim), rotated.
        cache: the layer's, this step's keys and values written.
        output: (T, heads, head_dim) to write to.
        metadata: of the step.
        scale: of the scores.
        window: positions that a token sees; 0 for all.
        kv_scales: see `AttentionBackend.forward`.
    """
    heads, head_dim = query.shape[1:]
    kv_heads = cache.shape[3]
    group = heads // kv_heads
    exact = query.dtype == torch.float32
    tokens = tile_tokens(heads, kv_heads, query.dtype)
    num_tiles, counted = metadata.tiles.shape[1], metadata.counts is not None
    programs = min(num_tiles * kv_heads, num_programs(query.device)) if counted else num_tiles * kv_heads
    _prefill[(programs,)](
        query, cache, output, metadata.prefills, metadata.tiles, metadata.counts, metadata.block_table, kv_scales,
        num_tiles, scale, cache.stride(0), query.stride(0), output.stride(0), cache.stride(1), cache.stride(2),
        metadata.block_table.stride(0), metadata.prefills.stride(0), metadata.tiles.stride(0),
        KV_HEADS=kv_heads, GROUP=group, TOKENS=tokens, ROWS=max(16, triton.next_power_of_2(tokens * group)),
        HEAD_DIM=head_dim, HEAD_PAD=max(16, triton.next_power_of_2(head_dim)), BLOCK_SIZE=cache.shape[2],
        COLUMNS=32 if exact else 64, WINDOW=window, PRECISION="ieee" if exact else "tf32", COUNTED=counted, num_warps=4,
        **overlap(query.device),
    )  # fmt: skip
