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
_COUNTED_SPLITS = 2
"""Where only the GPU knows the number of requests: they may be few."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How the work is cut."""

    splits: int
    """Parts of each sequence."""
    columns: int
    """Keys read at once."""
    warps: int
    stages: int = 3
    """Of reading ahead, where there are products of tensor cores to hide it behind."""
    uses_dot: bool = True
    """Whether a single head's products are padded so that tensor cores make them."""


def plan(num_requests: int, kv_heads: int, *, exact: bool, counted: bool = False, fp8: bool = False) -> DecodePlan:
    """As many parts as give an H100 about a thousand programs; `python -m bench.kernels decode mixed` tries others.

    `fp8` says that keys and values of 8 bits are read for one head each. Tensor cores would take values out of shared
    memory byte by byte.
    """
    programs = num_requests * kv_heads
    splits = min(_MOST_SPLITS, triton.next_power_of_2(triton.cdiv(1024, programs)))
    if counted:
        return DecodePlan(_COUNTED_SPLITS, 32 if exact else 64, 4, uses_dot=not exact and not fp8)
    if fp8 and splits < _MOST_SPLITS:
        return DecodePlan(splits, 64, 2, uses_dot=False)
    return DecodePlan(splits, 32 if exact or splits == _MOST_SPLITS else 64, 4, uses_dot=not exact and not fp8)


def shared_parts(splits: int) -> int:
    """Parts of a shared prefix, so that there is a power of two in all."""
    return {1: 3, 2: 6, 4: 4, 8: 8}.get(splits, splits)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    column, cache, value_offset, table, end, seq_len, block_stride, slot_stride,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Keys and values of the next columns (COLUMNS, HEAD_PAD), and which of them are seen."""
    columns = column + tl.arange(0, COLUMNS)
    dims = tl.arange(0, HEAD_PAD)
    in_range = columns < end
    blocks = tl.load(table + columns // BLOCK_SIZE, mask=in_range, other=0)
    slots = blocks.to(tl.int64) * block_stride + (columns % BLOCK_SIZE) * slot_stride
    kv_mask = in_range[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(cache + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0)
    v = tl.load(cache + value_offset + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0)
    if WINDOW > 0:
        in_range &= columns >= seq_len - WINDOW
    return k, v, in_range


@triton.jit  # type: ignore[untyped-decorator]
def _read_for_group(  # type: ignore[no-untyped-def]
    q, cache, value_offset, table, begin, end, seq_len, scale, block_stride, slot_stride,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The greatest score, the sum and the weighted values of each of the heads of q (heads, HEAD_PAD)."""
    best = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    for column in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        k, v, seen = _tile(
            column, cache, value_offset, table, end, seq_len, block_stride, slot_stride, HEAD_DIM, HEAD_PAD, BLOCK_SIZE,
            COLUMNS, WINDOW,
        )  # fmt: skip
        v = v.to(q.dtype)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        newest = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - newest[:, None])
        decay = tl.exp(best - newest)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        best = newest
    return best, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def _read_for_one(  # type: ignore[no-untyped-def]
    q, cache, value_offset, table, begin, end, seq_len, scale, block_stride, slot_stride,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """The same for the one head of q (1, HEAD_PAD), by plain products: tensor cores would multiply by fifteen others.

    Each of LANES columns of a tile goes into a softmax of its own, so that nothing passes between warps before the
    end.
    """
    LANES: tl.constexpr = 16
    query = q.to(tl.float32) * scale
    best = tl.full([LANES], -1e30, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    acc = tl.zeros([LANES, HEAD_PAD], tl.float32)
    for column in range(begin, end, COLUMNS):
        k, v, seen = _tile(
            column, cache, value_offset, table, end, seq_len, block_stride, slot_stride, HEAD_DIM, HEAD_PAD, BLOCK_SIZE,
            COLUMNS, WINDOW,
        )  # fmt: skip
        scores = tl.where(seen, tl.sum(query * k.to(tl.float32), 1), float("-inf"))
        scores = tl.reshape(scores, [COLUMNS // LANES, LANES])
        values = tl.reshape(v.to(tl.float32), [COLUMNS // LANES, LANES, HEAD_PAD])
        newest = tl.maximum(best, tl.max(scores, 0))
        weights = tl.exp(scores - newest[None, :])
        decay = tl.exp(best - newest)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay[:, None] + tl.sum(weights[:, :, None] * values, 0)
        best = newest
    greatest = tl.max(best, 0)
    decay = tl.exp(best - greatest)
    ones = tl.zeros([1], tl.float32)
    return ones + greatest, ones + tl.sum(total * decay, 0), tl.sum(acc * decay[:, None], 0)[None, :]


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
    first_slot = kv_head * HEAD_DIM
    if GROUP_PAD == 1:
        best, total, acc = _read_for_one(
            q, cache + first_slot, value_offset, table, begin, end, seq_len, scale, block_stride, slot_stride, HEAD_DIM,
            HEAD_PAD, BLOCK_SIZE, COLUMNS, WINDOW,
        )  # fmt: skip
    else:
        best, total, acc = _read_for_group(
            q, cache + first_slot, value_offset, table, begin, end, seq_len, scale, block_stride, slot_stride, HEAD_DIM,
            HEAD_PAD, BLOCK_SIZE, COLUMNS, STAGES, WINDOW, PRECISION,
        )  # fmt: skip
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
    counts, query, cache, output, partial, partial_lse, rows, positions, block_table, shared,
    kv_scales, scale, value_offset, query_stride, output_stride, block_stride, slot_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, SHARED_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one request, key-value head and part. Where only the GPU knows how many requests there are, the
    programs of those that are not there end at once: that costs less than programs that take one after the other.
    """
    wait_for_inputs(OVERLAP)
    if counts is not None:
        if tl.program_id(0) >= tl.load(counts):
            return
    _attend_part(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), query, cache, output, partial, partial_lse, rows,
        positions, block_table, shared, kv_scales, scale, value_offset, query_stride, output_stride, block_stride,
        slot_stride, table_stride, KV_HEADS, GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, BLOCK_SIZE, SPLITS, COLUMNS,
        STAGES, WINDOW, PRECISION, SHARED_PARTS,
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
    fp8 = kv_scales is not None and group == 1
    cut = chosen or plan(requests, kv_heads, exact=exact, counted=counts is not None, fp8=fp8)
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
    _decode[(requests, kv_heads, cut.splits)](counts, *arguments, **settings)
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
