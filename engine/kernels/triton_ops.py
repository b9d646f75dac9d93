"""The small operations as Triton kernels; each rounds where torch, op by op, would round."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import stream_linear
from engine.kernels.overlap import overlap, wait_for_inputs
from engine.kernels.row_linear import RowPlan, row_linear

_BLOCK = 1024


@triton.jit(do_not_specialize=["eps"])  # type: ignore[untyped-decorator]
def _rms_norm(x, residual, weight, normed, size, eps, ADD: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: one row."""
    columns = tl.arange(0, WIDTH)
    mask = columns < size
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    offsets = tl.program_id(0).to(tl.int64) * size + columns
    value = tl.load(x + offsets, mask=mask, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)).to(
            value.dtype
        )
        tl.store(residual + offsets, value, mask=mask)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    scaled = wide.to(value.dtype).to(tl.float32) * factor
    tl.store(normed + offsets, scaled.to(value.dtype), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _silu_mul(gate_up, output, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: part of a row."""
    wait_for_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=mask, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(output + row * size + columns, (activated * up.to(tl.float32)).to(gate.dtype), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _quick_gelu(x, output, count, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: some numbers."""
    wait_for_inputs(OVERLAP)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + places, mask=places < count, other=0.0)
    scaled = (value.to(tl.float32) * 1.702).to(value.dtype).to(tl.float32)
    gate = (1 / (1 + tl.exp(-scaled))).to(value.dtype).to(tl.float32)
    tl.store(output + places, (value.to(tl.float32) * gate).to(value.dtype), mask=places < count)


@triton.jit
def _as_cached(x, kv_scales, heads, is_key, cache):  # type: ignore[no-untyped-def]
    """Keys or values as the cache holds them; in fp8 what is too large becomes the largest number, since e4m3 has no
    infinity.
    """
    if kv_scales is None:
        return x
    else:
        scales = tl.load(kv_scales + heads, mask=is_key, other=1.0)[:, None]
        return tl.clamp(tl.div_rn(x.to(tl.float32), scales), -448.0, 448.0).to(cache.dtype.element_ty)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])  # type: ignore[untyped-decorator]
def _rotate_and_store(  # type: ignore[no-untyped-def]
    qkv, cos, sin, rotary_rows, cache, rows, positions, block_table, kv_scales,
    num_heads, num_kv_heads, value_offset, qkv_stride, block_stride, slot_stride, table_stride,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: `HEADS` query or key heads of one token, and the keys' values."""
    wait_for_inputs(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, HALF_PAD)
    in_half = dims < HALF
    is_key = (heads >= num_heads) & (heads < num_heads + num_kv_heads)
    mask = (heads < num_heads + num_kv_heads)[:, None] & in_half[None, :]
    angle = tl.load(rotary_rows + token).to(tl.int64) * HALF + dims
    c = tl.load(cos + angle, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=in_half, other=0.0).to(tl.float32)[None, :]
    offsets = token * qkv_stride + heads[:, None] * (2 * HALF) + dims[None, :]
    first = tl.load(qkv + offsets, mask=mask, other=0.0)
    second = tl.load(qkv + offsets + HALF, mask=mask, other=0.0)
    dtype = first.dtype
    turned_first = (first.to(tl.float32) * c - second.to(tl.float32) * s).to(dtype)
    turned_second = (second.to(tl.float32) * c + first.to(tl.float32) * s).to(dtype)

    is_query = (heads < num_heads)[:, None] & in_half[None, :]
    tl.store(qkv + offsets, turned_first, mask=is_query)
    tl.store(qkv + offsets + HALF, turned_second, mask=is_query)
    position = tl.load(positions + token)
    block = tl.load(block_table + tl.load(rows + token).to(tl.int64) * table_stride + position // BLOCK_SIZE)
    place = block.to(tl.int64) * block_stride + (position % BLOCK_SIZE) * slot_stride
    places = place + (heads - num_heads)[:, None] * (2 * HALF) + dims[None, :]
    key_mask = is_key[:, None] & in_half[None, :]
    for half in tl.static_range(2):
        key = turned_first if half == 0 else turned_second
        value = tl.load(qkv + offsets + (num_kv_heads * 2 + half) * HALF, mask=key_mask, other=0.0)
        key = _as_cached(key, kv_scales, heads - num_heads, is_key, cache)
        value = _as_cached(value, kv_scales, heads - num_heads + num_kv_heads, is_key, cache)
        tl.store(cache + places + half * HALF, key, mask=key_mask)
        tl.store(cache + value_offset + places + half * HALF, value, mask=key_mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `engine.kernels.rms_norm`."""
    return _norm(x, x, weight, eps, add=False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `engine.kernels.add_rms_norm`."""
    return _norm(x, residual, weight, eps, add=True)


def _norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, add: bool) -> Tensor:
    normed = torch.empty_like(x)
    rows, size = x.shape
    width = triton.next_power_of_2(size)
    _rms_norm[(rows,)](
        x,
        residual,
        weight,
        normed,
        size,
        eps,
        ADD=add,
        WIDTH=width,
        num_warps=min(16, max(1, width // 512)),
        **overlap(x.device),
    )
    return normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `engine.kernels.silu_mul`."""
    rows, both = gate_up.shape
    output = torch.empty(rows, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(rows, triton.cdiv(both // 2, _BLOCK))](
        gate_up, output, both // 2, BLOCK=_BLOCK, **overlap(gate_up.device)
    )
    return output


def quick_gelu(x: Tensor) -> Tensor:
    """See `engine.kernels.quick_gelu`."""
    x = x.contiguous()
    output = torch.empty_like(x)
    _quick_gelu[(triton.cdiv(x.numel(), _BLOCK),)](x, output, x.numel(), BLOCK=_BLOCK, **overlap(x.device))
    return output


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `engine.kernels.linear`."""
    is_plain = x.ndim == 2 and x.is_contiguous() and weight.is_contiguous() and bias is None
    if is_plain and x.dtype != torch.float32:
        rows = x.shape[0]
        if rows == 1:
            return row_linear(x, weight, RowPlan())
        if rows <= stream_linear.MOST_ROWS and stream_linear.works_on(x.device, x.dtype):
            plan = stream_linear.plan(rows, *weight.shape[::-1])
            if plan is not None:
                return stream_linear.stream_linear(x, weight, plan)
    return F.linear(x, weight, bias)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_rows: Tensor,
    cache: Tensor,
    rows: Tensor,
    positions: Tensor,
    block_table: Tensor,
    kv_scales: Tensor | None,
) -> None:
    """Rotate the queries in place, and put the rotated keys and the values into the cache.

    Args:
        qkv: (T, heads + 2 * kv_heads, head_dim) queries, keys and values.
        cos: table of cosines, (angles, head_dim / 2).
        sin: table of sines.
        rotary_rows: (T) int32 rows of those tables.
        cache: (2, blocks, block_size, kv_heads, head_dim) keys, then values.
        rows: (T) int32 rows of the block table.
        positions: (T) int32 of each token in its sequence.
        block_table: (slots, blocks) int32.
        kv_scales: see `AttentionBackend.forward`.
    """
    tokens, heads, head_dim = qkv.shape
    kv_heads, half = cache.shape[3], head_dim // 2
    turned = heads - kv_heads
    per_program = min(16, triton.next_power_of_2(turned))
    _rotate_and_store[(tokens, triton.cdiv(turned, per_program))](
        qkv, cos, sin, rotary_rows, cache, rows, positions, block_table, kv_scales,
        heads - 2 * kv_heads, kv_heads, cache.stride(0), qkv.stride(0), cache.stride(1), cache.stride(2),
        block_table.stride(0),
        HALF=half, HALF_PAD=triton.next_power_of_2(half), BLOCK_SIZE=cache.shape[2], HEADS=per_program,
        **overlap(qkv.device),
    )  # fmt: skip
