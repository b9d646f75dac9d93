"""Compiled loops around the products; `tests/engine/attention/test_sdpa.py` runs the rotation."""

import pytest
import torch

from engine.kernels import torch_ops
from engine.kernels.cpu_ops import add_rms_norm, quick_gelu, silu_mul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 7), (5, 130)])
def test_norm_as_by_torch(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    x, residual = (torch.randn(shape, generator=generator).to(dtype) * 3 for _ in range(2))
    weight = torch.randn(shape[1], generator=generator).to(dtype)
    expected_residual = residual.clone()
    monkeypatch.setattr(torch_ops, "runs_compiled", lambda: False)
    expected = torch_ops.add_rms_norm(x, expected_residual, weight, 1e-5)
    found = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected_residual)
    # A norm that lies between two numbers may be rounded either way.
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("rows", [1, 400])
def test_what_is_no_number_spoils_its_own_row(rows: int, number: float) -> None:
    """On one thread and on all, and without an error that nobody would see."""
    x, residual, weight = torch.ones(rows, 256), torch.zeros(rows, 256), torch.ones(256)
    x[-1] = number
    found = add_rms_norm(x, residual, weight, 0.0)
    assert not found[-1].isfinite().any()
    torch.testing.assert_close(found[:-1], torch.ones(rows - 1, 256))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_as_by_torch(dtype: torch.dtype) -> None:
    """Ties, subnormal numbers, and what is too large: the sum with nothing is the number itself, rounded."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(-(1 << 15), 1 << 15, (2, 20_000), generator=generator).to(torch.int16).view(dtype)
    pairs = pairs[:, (pairs.float().isfinite() & (pairs.float().abs() < 1e30)).all(0)]
    x, residual = (row.view(1, -1).clone() for row in pairs)
    expected = (x.float() + residual.float()).to(dtype)
    add_rms_norm(x, residual, torch.ones(x.shape[1], dtype=dtype), 1e-5)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 7), (70, 1030)])
def test_activations_as_by_torch(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one thread and on all, and where the exponential is nothing or endless."""
    rows, size = shape
    x = torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(rows)).to(dtype) * 9
    x[0, 0], x[0, -1] = -300, 300
    found = silu_mul(x), quick_gelu(x)
    monkeypatch.setattr(torch_ops, "runs_compiled", lambda: False)
    # Torch rounds the sigmoid too, what is compiled only the product.
    expected = torch_ops.silu_mul(x), torch_ops.quick_gelu(x.float()).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
