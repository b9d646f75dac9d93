"""Attention of requests with one token: bound by the reading of keys and values, so that each sequence is split among
several programs where the batch alone cannot keep the GPU busy (Dao et al., Flash-Decoding, 2023).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention import AttentionMetadata


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


def plan(num_requests: int, kv_heads: int, *, exact: bool) -> DecodePlan:
    """As many parts as give an H100 about a thousand programs; `python -m bench.kernels decode` tries others."""
    programs = num_requests * kv_heads
    splits = min(16, triton.next_power_of_2(triton.cdiv(1024, programs)))
    return DecodePlan(splits, 32 if exact else 64, 4, uses_dot=not exact)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    query, cache, output, partial, partial_lse, rows, positions, block_table,
    scale, value_offset, query_stride, output_stride, block_stride, slot_stride, table_stride,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the heads of one key-value head over one part of one sequence."""
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    table = block_table + tl.load(rows + request).to(tl.int64) * table_stride
    seq_len = tl.load(positions + request) + 1
    first = 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0) // COLUMNS * COLUMNS
    part = tl.cdiv(tl.cdiv(seq_len - first, SPLITS), COLUMNS) * COLUMNS
    begin = first + split * part
    end = tl.minimum(begin + part, seq_len)

    dims = tl.arange(0, HEAD_PAD)
    members = tl.arange(0, GROUP_PAD)
    heads = kv_head * GROUP + members
    head_mask = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    in_head = heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(query + request.to(tl.int64) * query_stride + in_head, mask=head_mask, other=0.0)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for column in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        columns = column + tl.arange(0, COLUMNS)
        in_range = columns < end
        blocks = tl.load(table + columns // BLOCK_SIZE, mask=in_range, other=0)
        slots = blocks.to(tl.int64) * block_stride + (columns % BLOCK_SIZE) * slot_stride + kv_head * HEAD_DIM
        kv_mask = in_range[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(cache + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0)
        v = tl.load(cache + value_offset + slots[:, None] + dims[None, :], mask=kv_mask, other=0.0)
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
    if SPLITS == 1:
        acc = acc / total[:, None]
        places = request.to(tl.int64) * output_stride + in_head
        tl.store(output + places, acc.to(output.dtype.element_ty), mask=head_mask)
    else:
        # A part without keys has a sum of zero, and so no weight among the others.
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        lse = tl.where(total > 0, best + tl.log(total), float("-inf"))
        places = (request * tl.num_programs(1) * GROUP + heads) * SPLITS + split
        tl.store(partial_lse + places, lse, mask=members < GROUP)
        tl.store(partial + places[:, None] * HEAD_PAD + dims[None, :], acc, mask=(members < GROUP)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    partial, partial_lse, output, output_stride,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: the parts of one request and head."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    parts = (request * tl.num_programs(1) + head) * SPLITS + tl.arange(0, SPLITS)
    dims = tl.arange(0, HEAD_PAD)
    lse = tl.load(partial_lse + parts)
    weights = tl.exp(lse - tl.max(lse, 0))
    values = tl.load(partial + parts[:, None] * HEAD_PAD + dims[None, :])
    merged = tl.sum(weights[:, None] * values, 0) / tl.sum(weights, 0)
    places = request.to(tl.int64) * output_stride + head * HEAD_DIM + dims
    tl.store(output + places, merged.to(output.dtype.element_ty), mask=dims < HEAD_DIM)


def decode_attention(
    query: Tensor,
    cache: Tensor,
    output: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int,
    chosen: DecodePlan | None = None,
) -> None:
    """Attend for the first `num_decodes` requests; the arguments are those of `prefill_attention`."""
    requests = metadata.num_decodes
    heads, head_dim = query.shape[1:]
    kv_heads = cache.shape[3]
    group, head_pad = heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    exact = query.dtype == torch.float32
    cut = chosen or plan(requests, kv_heads, exact=exact)
    group_pad = 1 if group == 1 and not cut.uses_dot else max(16, triton.next_power_of_2(group))
    if cut.splits == 1:
        partial = partial_lse = output
    else:
        partial = torch.empty(requests, heads, cut.splits, head_pad, dtype=torch.float32, device=query.device)
        partial_lse = torch.empty(requests, heads, cut.splits, dtype=torch.float32, device=query.device)
    _decode[(requests, kv_heads, cut.splits)](
        query, cache, output, partial, partial_lse, metadata.token_rows, metadata.positions, metadata.block_table,
        scale, cache.stride(0), query.stride(0), output.stride(0), cache.stride(1), cache.stride(2),
        metadata.block_table.stride(0),
        GROUP=group, GROUP_PAD=group_pad, HEAD_DIM=head_dim, HEAD_PAD=head_pad, BLOCK_SIZE=cache.shape[2],
        SPLITS=cut.splits, COLUMNS=cut.columns, STAGES=cut.stages, WINDOW=window,
        PRECISION="ieee" if exact else "tf32", num_warps=cut.warps,
    )  # fmt: skip
    if cut.splits > 1:
        _merge[(requests, heads)](
            partial, partial_lse, output, output.stride(0),
            HEAD_DIM=head_dim, HEAD_PAD=head_pad, SPLITS=cut.splits, num_warps=2,
        )  # fmt: skip
