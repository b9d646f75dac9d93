"""The small operations in torch: for the CPU, and what the kernels are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cpu_features import multiplies_fast, multiplies_in, runs_compiled
from engine.kernels.cpu_packed import packed_linear

_WIDENING_PAYS = 16
"""Rows from which a product in float32 makes up for widening the weight, on a CPU without instructions for its type."""
_MOST_THIN = 32
"""Rows up to which a compiled product is faster than torch's."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `engine.kernels.rms_norm`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `engine.kernels.add_rms_norm`."""
    if _is_compiled(x):
        from engine.kernels.cpu_ops import add_rms_norm  # numba takes time to import: not beside a GPU

        return add_rms_norm(x, residual, weight, eps)
    return rms_norm(residual.add_(x), weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `engine.kernels.silu_mul`."""
    if _is_compiled(gate_up):
        from engine.kernels.cpu_ops import silu_mul

        return silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def quick_gelu(x: Tensor) -> Tensor:
    """See `engine.kernels.quick_gelu`."""
    if _is_compiled(x):
        from engine.kernels.cpu_ops import quick_gelu

        return quick_gelu(x)
    return x * torch.sigmoid(1.702 * x)


def _is_compiled(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype.itemsize <= 4 and x.is_contiguous() and runs_compiled()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `engine.kernels.linear`."""
    if weight.is_mkldnn:
        return packed_linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if rows <= _MOST_THIN and x.device.type == "cpu" and not multiplies_fast(x.dtype) and runs_compiled():
        from engine.kernels.cpu_linear import thin_linear, works_on  # numba takes time to import: not beside a GPU

        if works_on(weight):
            product = thin_linear(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
            return product if bias is None else product.add_(bias)
    if rows < _WIDENING_PAYS or x.device.type != "cpu" or multiplies_in(x.dtype):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of (B, heads, tokens, head_dim) to keys and values, whose heads may be fewer.

    Args:
        query: in the type that the result has too.
        key: (B, kv_heads, keys, head_dim), of any type.
        value: likewise.
        mask: (tokens, keys) true where a key is seen; None: all are.
        is_causal: without a mask and with as many keys as tokens, each token sees those up to its own.
        scale: of the scores; None: one over the root of the head's size.
    """
    dtype = query.dtype
    widens = query.device.type == "cpu" and not multiplies_in(dtype)
    query, key, value = (x.to(torch.float32 if widens else dtype) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return attended.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (T, heads, head_dim) by (T, 1, head_dim / 2); the halves are the pairs' first and second members."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
