"""Weights in the order in which a processor's matrix unit reads them, which oneDNN brings them into once."""

import torch
from torch import Tensor

from engine.kernels.cpu_features import multiplies_in

_ROWS = 16
"""That the order is chosen for; it is about as good for one row and for hundreds."""


def pack(weight: Tensor) -> Tensor | None:
    """`weight` (out, in) for `packed_linear`, which reads it about twice as fast as torch reads it as it is; None where
    that was not seen to pay, or torch cannot do so.
    """
    if weight.dtype != torch.bfloat16 or not multiplies_in(weight.dtype):
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        packed_linear(weight[:1], packed, None)
    except (AttributeError, RuntimeError):  # it belongs to torch's compiler, and may change
        return None
    return packed


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` (…, in) times the transpose of the weight, and a bias (out)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
