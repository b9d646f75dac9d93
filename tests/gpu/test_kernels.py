"""The small kernels against torch."""

import pytest
import torch

from engine.kernels import torch_ops
from tests.gpu.conftest import DEVICE, INTERPRETS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}


@pytest.mark.parametrize("size", [64, 160, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: torch.dtype, size: int) -> None:
    from engine.kernels import triton_ops

    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, size, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    weight = torch.rand(size, generator=generator).to(dtype).to(DEVICE)
    torch.testing.assert_close(
        triton_ops.rms_norm(x, weight, 1e-5), torch_ops.rms_norm(x, weight, 1e-5), **tolerances(dtype)
    )
    ours, theirs = residual.clone(), residual.clone()
    found = triton_ops.add_rms_norm(x, ours, weight, 1e-5)
    torch.testing.assert_close(found, torch_ops.add_rms_norm(x, theirs, weight, 1e-5), **tolerances(dtype))
    torch.testing.assert_close(ours, theirs, **tolerances(dtype))


@pytest.mark.parametrize("size", [64, 1500, 11008])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(dtype: torch.dtype, size: int) -> None:
    from engine.kernels import triton_ops

    gate_up = (torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(0)) * 3).to(dtype).to(DEVICE)
    torch.testing.assert_close(triton_ops.silu_mul(gate_up), torch_ops.silu_mul(gate_up), **tolerances(dtype))


@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quick_gelu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from engine.kernels import triton_ops

    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype).to(DEVICE)
    torch.testing.assert_close(triton_ops.quick_gelu(x), torch_ops.quick_gelu(x), **tolerances(dtype))


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_rotation_and_cache(dtype: torch.dtype, kv_heads: int, head_dim: int) -> None:
    """Turned by no angle: each head's numbers are divided by its scale, rounded and cut off, as in torch."""
    from engine.kernels import triton_ops

    generator = torch.Generator().manual_seed(0)
    tokens, heads, block = 20, 6, 16
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator) * 10
    qkv[3, heads:], qkv[4, heads:], qkv[5, heads:] = 1e4, -1e4, 1e-3
    qkv = qkv.to(dtype).to(DEVICE)
    scales = (torch.rand(2, kv_heads, generator=generator) / 4 + 0.01).to(DEVICE)
    angles = torch.zeros(tokens, head_dim // 2, dtype=dtype, device=DEVICE)
    cache = torch.zeros(2, 3, block, kv_heads, head_dim, device=DEVICE).to(torch.float8_e4m3fn)
    positions = torch.arange(tokens, device=DEVICE).int()
    table = torch.tensor([[2, 1]], device=DEVICE).int()
    before = qkv.clone()
    triton_ops.rotate_and_store(qkv, angles + 1, angles, positions, cache, positions * 0, positions, table, scales)
    assert torch.equal(qkv, before)
    for part, scale, written in zip(before[:, heads:].split(kv_heads, dim=1), scales, cache.float(), strict=True):
        expected = (part.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert torch.equal(written[table[0].long()].flatten(0, 1)[:tokens], expected)
        assert expected.abs().max() == 448


@pytest.mark.skipif(INTERPRETS, reason="Triton has no interpreter for its lower level")
@pytest.mark.parametrize(("size_in", "size_out"), [(4096, 4096), (11008, 4096), (1024, 96), (8192, 100), (4096, 32064)])
@pytest.mark.parametrize("rows", [2, 16, 17, 32, 45, 64, 100, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stream_linear(dtype: torch.dtype, rows: int, size_in: int, size_out: int) -> None:
    from engine.kernels.stream_linear import plan, stream_linear, works_on

    if not works_on(torch.device(DEVICE), dtype):
        pytest.skip("needs a Hopper GPU, and a Triton that the kernel knows")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, size_in, generator=generator).to(dtype).to(DEVICE) for n in (rows, size_out))
    cut = plan(rows, size_in, size_out)
    assert cut is not None
    found = [stream_linear(x, weight, cut) for _ in range(3)]
    torch.testing.assert_close(found[0], (x.double() @ weight.double().T).to(dtype), **tolerances(dtype))
    assert all(torch.equal(found[0], again) for again in found[1:])


@pytest.mark.skipif(INTERPRETS, reason="Triton has no interpreter for its lower level")
def test_products_that_no_plan_fits_take_another_way() -> None:
    from engine.kernels.stream_linear import plan

    assert plan(32, 1000, 64) is None and plan(128, 256, 64) is None
    assert plan(32, 4096, 4096) != plan(32, 11008, 4096)


@pytest.mark.parametrize(("size_in", "size_out"), [(256, 96), (192, 100), (1000, 33), (2048, 6)])
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETS else [torch.bfloat16, torch.float16])
def test_row_linear(dtype: torch.dtype, size_in: int, size_out: int) -> None:
    from engine.kernels.row_linear import RowPlan, row_linear

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, size_in, generator=generator).to(dtype).to(DEVICE) for n in (1, size_out))
    expected = (x.double() @ weight.double().T).to(dtype)
    for cut in (RowPlan(16, 512, 4, 1), RowPlan()):
        torch.testing.assert_close(row_linear(x, weight, cut), expected, **tolerances(dtype))
