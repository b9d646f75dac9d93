"""Attention of requests with one token: bound by the reading of keys and values, so that each sequence is split among
several programs where the batch alone cannot keep the GPU busy (Dao et al., Flash-Decoding, 2023).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention import AttentionMetadata, tile_tokens
from engine.attention.programs import num_programs
from engine.attention.triton_fp8 import for_products, scale_at
from engine.kernels.overlap import overlap, wait_for_inputs

_MOST_SPLITS = 16
_COUNTED_SPLITS = 4
"""Where only the GPU knows the number of requests: fewer would leave some programs with more to do than others."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How the work is cut."""

    splits: int
    """Parts of each sequence."""
    columns: int
    """Keys read at once."""
    warps: int
    stages: int = 3
    uses_dot: bool = True
    """Whether a single head's products are padded so that tensor cores make them."""


def plan(num_requests: int, kv_heads: int, *, exact: bool, counted: bool = False) -> DecodePlan:
    """As many parts as give an H100 about a thousand programs; `python -m bench.kernels decode mixed` tries others."""
    programs = num_requests * kv_heads
    splits = min(_MOST_SPLITS, triton.next_power_of_2(triton.cdiv(1024, programs)))
    columns = 32 if exact or splits == _MOST_SPLITS else 64
    return DecodePlan(_COUNTED_SPLITS if counted else splits, columns, 4, uses_dot=not exact)


def shared_parts(splits: int) -> int:
    """Parts of a shared prefix, so that there is a power of two in all."""
    return {1: 3, 2: 6, 4: 4, 8: 8}.get(splits, splits)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_part(  # type: ignore[no-untyped-def]
    request, kv_head, split, query, cache, output, partial, partial_lse, rows, positions, block_table, shared,
    kv_scales, scale, value_offset, query_stride, output_stride, block_stride, slot_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, SHARED_PARTS: tl.constexpr,
):  # fmt: skip
    """Attend with the heads of one key-value head to one part of one sequence."""
    table = block_table + tl.load(rows + request).to(tl.int64) * table_stride
    seq_len = tl.load(positions + request) + 1
    first = 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0) // COLUMNS * COLUMNS
    if SHARED_PARTS > 0:
        first = tl.where(request < tl.load(shared), tl.load(shared + 1), 0)
    part = tl.cdiv(tl.cdiv(seq_len - first, SPLITS), COLUMNS) * COLUMNS
    begin = first + split * part
    end = tl.minimum(begin + part, seq_len)

    dims = tl.arange(0, HEAD_PAD)
    members = tl.arange(0, GROUP_PAD)
    heads = kv_head * GROUP + members
    head_mask = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    in_head = heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(query + tl.cast(request, tl.int64) * query_stride + in_head, mask=head_mask, other=0.0)
    q = for_products(q, kv_scales)
    scale *= scale_at(kv_scales, kv_head)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for column in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        columns = column + tl.arange(0, COLUMNS)
        in_range = columns < end
        blocks = tl.load(table + columns // BLOCK_SIZE, mask=in_range, other=0)
        slots = blocks.to(tl.int64) * block_stride + (columns % BLOCK_SIZE) * slot_stride + kv_head * HEAD_DIM
        kv_mask = in_range[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(cache + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0).to(q.dtype)
        v = tl.load(cache + value_offset + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0).to(q.dtype)
        if GROUP_PAD == 1:
            scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :] * scale
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = in_range
        if WINDOW > 0:
            seen &= columns >= seq_len - WINDOW
        scores = tl.where(seen[None, :], scores, float("-inf"))
        newest = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - newest[:, None])
        decay = tl.exp(best - newest)
        total = total * decay + tl.sum(weights, 1)
        if GROUP_PAD == 1:
            weighted = tl.sum(tl.reshape(weights, [COLUMNS, 1]) * v.to(tl.float32), 0)[None, :]
        else:
            weighted = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        acc = acc * decay[:, None] + weighted
        best = newest
    acc *= scale_at(kv_scales, KV_HEADS + kv_head)
    if SPLITS + SHARED_PARTS == 1:
        acc = acc / total[:, None]
        places = tl.cast(request, tl.int64) * output_stride + in_head
        tl.store(output + places, acc.to(output.dtype.element_ty), mask=head_mask)
    else:
        # A part without keys has a sum of zero, and so no weight among the others.
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        lse = tl.where(total > 0, best + tl.log(total), float("-inf"))
        places = (request * KV_HEADS * GROUP + heads) * (SPLITS + SHARED_PARTS)
        tl.store(partial_lse + places + split, lse, mask=members < GROUP)
        tl.store(partial + (places + split)[:, None] * HEAD_PAD + dims[None, :], acc, mask=(members < GROUP)[:, None])
        if SHARED_PARTS > 0:
            # Who shares nothing has no weight in those parts.
            if (split == 0) & (request >= tl.load(shared)):
                others = tl.arange(0, SPLITS + SHARED_PARTS)
                tl.store(
                    partial_lse + places[:, None] + others[None, :],
                    tl.full([GROUP_PAD, SPLITS + SHARED_PARTS], float("-inf"), tl.float32),
                    mask=(members < GROUP)[:, None] & (others >= SPLITS)[None, :],
                )


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    query, cache, output, partial, partial_lse, rows, positions, block_table, shared,
    kv_scales, scale, value_offset, query_stride, output_stride, block_stride, slot_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, SHARED_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one request, key-value head and part."""
    wait_for_inputs(OVERLAP)
    _attend_part(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), query, cache, output, partial, partial_lse, rows,
        positions, block_table, shared, kv_scales, scale, value_offset, query_stride, output_stride, block_stride,
        slot_stride, table_stride, KV_HEADS, GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, BLOCK_SIZE, SPLITS, COLUMNS,
        STAGES, WINDOW, PRECISION, SHARED_PARTS,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _decode_counted(  # type: ignore[no-untyped-def]
    counts, query, cache, output, partial, partial_lse, rows, positions, block_table, shared,
    kv_scales, scale, value_offset, query_stride, output_stride, block_stride, slot_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, SHARED_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The same where only the GPU knows how many requests there are: each program takes one after the other."""
    wait_for_inputs(OVERLAP)
    for item in range(tl.program_id(0), tl.load(counts) * KV_HEADS * SPLITS, tl.num_programs(0)):
        _attend_part(
            item // (KV_HEADS * SPLITS), item // SPLITS % KV_HEADS, item % SPLITS, query, cache, output, partial,
            partial_lse, rows, positions, block_table, shared, kv_scales, scale, value_offset, query_stride,
            output_stride, block_stride, slot_stride, table_stride, KV_HEADS, GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD,
            BLOCK_SIZE, SPLITS, COLUMNS, STAGES, WINDOW, PRECISION, SHARED_PARTS,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _decode_shared(  # type: ignore[no-untyped-def]
    query, cache, partial, partial_lse, block_table, shared, kv_scales,
    scale, value_offset, query_stride, block_stride, slot_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, SHARED_PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend to the shared beginning, whose keys are read once for `TOKENS` requests; as `_attend_part` beyond it.

    Each program takes one triple of some requests, a key-value head and a part after the other.
    """
    wait_for_inputs(OVERLAP)
    num_members = tl.load(shared)
    length = tl.load(shared + 1)
    table = block_table + tl.load(shared + 2).to(tl.int64) * table_stride
    chunk = tl.cdiv(tl.cdiv(length, SHARED_PARTS), COLUMNS) * COLUMNS
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_PAD)
    for item in range(tl.program_id(0), tl.cdiv(num_members, TOKENS) * KV_HEADS * SHARED_PARTS, tl.num_programs(0)):
        part = item % SHARED_PARTS
        kv_head = item // SHARED_PARTS % KV_HEADS
        requests = item // (SHARED_PARTS * KV_HEADS) * TOKENS + rows // GROUP
        heads = kv_head * GROUP + rows % GROUP
        row_mask = (rows < TOKENS * GROUP) & (requests < num_members)
        in_head = heads[:, None] * HEAD_DIM + dims[None, :]
        q = tl.load(
            query + requests[:, None].to(tl.int64) * query_stride + in_head,
            mask=row_mask[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        q = for_products(q, kv_scales)
        score_scale = scale * scale_at(kv_scales, kv_head)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        begin = part * chunk
        end = tl.minimum(begin + chunk, length)
        for column in range(begin, end, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            in_range = columns < end
            blocks = tl.load(table + columns // BLOCK_SIZE, mask=in_range, other=0)
            slots = blocks.to(tl.int64) * block_stride + (columns % BLOCK_SIZE) * slot_stride + kv_head * HEAD_DIM
            kv_mask = in_range[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(cache + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0).to(q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
            scores = tl.where(in_range[None, :], scores, float("-inf"))
            newest = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp(scores - newest[:, None])
            decay = tl.exp(best - newest)
            total = total * decay + tl.sum(weights, 1)
            v = tl.load(cache + value_offset + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0).to(q.dtype)
            acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            best = newest
        acc = acc / tl.where(total > 0, total, 1.0)[:, None] * scale_at(kv_scales, KV_HEADS + kv_head)
        lse = tl.where(total > 0, best + tl.log(total), float("-inf"))
        places = (requests * KV_HEADS * GROUP + heads) * (SPLITS + SHARED_PARTS) + SPLITS + part
        tl.store(partial_lse + places, lse, mask=row_mask)
        tl.store(partial + places[:, None] * HEAD_PAD + dims[None, :], acc, mask=row_mask[:, None])


@triton.jit(do_not_specialize=["num_requests"])  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    partial, partial_lse, output, counts, num_requests, output_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PARTS: tl.constexpr, COUNTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Join the parts, of one request and head after the other."""
    wait_for_inputs(OVERLAP)
    if COUNTED:
        num_requests = tl.load(counts)
    dims = tl.arange(0, HEAD_PAD)
    for item in range(tl.program_id(0), num_requests * HEADS, tl.num_programs(0)):
        parts = item * PARTS + tl.arange(0, PARTS)
        lse = tl.load(partial_lse + parts)
        weights = tl.exp(lse - tl.max(lse, 0))
        is_part = lse > float("-inf")  # nothing was written elsewhere
        values = tl.load(partial + parts[:, None] * HEAD_PAD + dims[None, :], mask=is_part[:, None], other=0.0)
        merged = tl.sum(weights[:, None] * values, 0) / tl.sum(weights, 0)
        places = tl.cast(item // HEADS, tl.int64) * output_stride + (item % HEADS) * HEAD_DIM + dims
        tl.store(output + places, merged.to(output.dtype.element_ty), mask=dims < HEAD_DIM)


def decode_attention(
    query: Tensor,
    cache: Tensor,
    output: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int,
    kv_scales: Tensor | None,
    chosen: DecodePlan | None = None,
) -> None:
    """Attend for the first `num_decodes` requests; the arguments are those of `prefill_attention`."""
    requests, counts = metadata.num_decodes, metadata.counts
    heads, head_dim = query.shape[1:]
    kv_heads = cache.shape[3]
    group, head_pad = heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    exact = query.dtype == torch.float32
    cut = chosen or plan(requests, kv_heads, exact=exact, counted=counts is not None)
    group_pad = 1 if group == 1 and not cut.uses_dot else max(16, triton.next_power_of_2(group))
    shares = metadata.shared is not None and not window
    num_shared = shared_parts(cut.splits) if shares else 0
    parts = cut.splits + num_shared
    partial = partial_lse = output
    if parts > 1:
        partial = torch.empty(requests, heads, parts, head_pad, dtype=torch.float32, device=query.device)
        partial_lse = torch.empty(requests, heads, parts, dtype=torch.float32, device=query.device)
    cache_strides = (cache.stride(1), cache.stride(2), metadata.block_table.stride(0))
    arguments = (
        query, cache, output, partial, partial_lse, metadata.token_rows, metadata.positions, metadata.block_table,
        metadata.shared, kv_scales, scale, cache.stride(0), query.stride(0), output.stride(0), *cache_strides,
    )  # fmt: skip
    common = {
        "KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "HEAD_PAD": head_pad,
        "BLOCK_SIZE": cache.shape[2], "SPLITS": cut.splits, "SHARED_PARTS": num_shared, "COLUMNS": cut.columns,
        "PRECISION": "ieee" if exact else "tf32", **overlap(query.device),
    }  # fmt: skip
    settings = {"GROUP_PAD": group_pad, "STAGES": cut.stages, "WINDOW": window, "num_warps": cut.warps, **common}
    programs = num_programs(query.device)
    if counts is None:
        _decode[(requests, kv_heads, cut.splits)](*arguments, **settings)
    else:
        _decode_counted[(min(programs, requests * kv_heads * cut.splits),)](counts, *arguments, **settings)
    if shares:
        tokens = tile_tokens(heads, kv_heads, query.dtype)
        _decode_shared[(programs,)](
            query, cache, partial, partial_lse, metadata.block_table, metadata.shared, kv_scales,
            scale, cache.stride(0), query.stride(0), *cache_strides,
            TOKENS=tokens, ROWS=max(16, triton.next_power_of_2(tokens * group)), num_warps=4, **common,
        )  # fmt: skip
    if parts > 1:
        items = requests * heads
        _merge[(items if counts is None else min(programs, items),)](
            partial, partial_lse, output, counts, requests, output.stride(0),
            HEADS=heads, HEAD_DIM=head_dim, HEAD_PAD=head_pad, PARTS=parts, COUNTED=counts is not None, num_warps=2,
            **overlap(query.device),
        )  # fmt: skip
