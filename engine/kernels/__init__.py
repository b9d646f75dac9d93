"""What surrounds the matrix products: one Triton kernel each on a GPU, torch elsewhere."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import Tensor

from engine.kernels import torch_ops

if TYPE_CHECKING or not find_spec("triton"):  # which comes with CUDA builds of torch only
    from engine.kernels import torch_ops as gpu_ops
else:
    from engine.kernels import triton_ops as gpu_ops


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of (T, size) computed in float32 (Zhang and Sennrich, 2019)."""
    if x.is_cuda:
        return gpu_ops.rms_norm(x, weight, eps)
    return torch_ops.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `x` (T, size) to the residual in place, and return the residual's norm."""
    if x.is_cuda:
        return gpu_ops.add_rms_norm(x, residual, weight, eps)
    return torch_ops.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """(T, 2 * size) gates and values to (T, size): silu(gate) * value (Shazeer, 2020)."""
    if gate_up.is_cuda:
        return gpu_ops.silu_mul(gate_up)
    return torch_ops.silu_mul(gate_up)


def quick_gelu(x: Tensor) -> Tensor:
    """`x` times sigmoid(1.702 x), which CLIP takes for the Gaussian error linear unit (Hendrycks and Gimpel, 2016)."""
    if x.is_cuda:
        return gpu_ops.quick_gelu(x)
    return torch_ops.quick_gelu(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` (…, in) times the transpose of `weight` (out, in), and a bias (out)."""
    if x.is_cuda:
        return gpu_ops.linear(x, weight, bias)
    return torch_ops.linear(x, weight, bias)
