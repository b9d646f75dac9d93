"""On a CPU small products are compiled; without instructions for half precision, larger ones and attention are made in
float32.
"""

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import cpu_features, torch_ops

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True])
def has_instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch_ops, "multiplies_in", lambda dtype: request.param or dtype == torch.float32)
    monkeypatch.setattr(torch_ops, "multiplies_fast", lambda dtype: request.param)
    return bool(request.param)


@pytest.fixture(params=[False, True])
def has_numba(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(torch_ops, "runs_compiled", lambda: False)
    assert torch_ops.runs_compiled() == request.param


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 48), (15, 48), (16, 48), (3, 5, 48), (33, 48), (3, 20, 48)])
@pytest.mark.usefixtures("has_instructions", "has_numba")
def test_linear(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator).to(dtype), torch.randn(32, 48, generator=generator).to(dtype)
    added = torch.randn(32, generator=generator).to(dtype) if bias else None
    found = torch_ops.linear(x, weight, added)
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.usefixtures("has_instructions")
def test_attend(kv_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 16, generator=generator).to(dtype)
    key, value = (torch.randn(2, kv_heads, 7, 16, generator=generator).to(dtype) for _ in range(2))
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2)
    found = torch_ops.attend(query, key, value, mask=mask, scale=0.3)
    wide_key, wide_value = (tensor.double().repeat_interleave(4 // kv_heads, dim=1) for tensor in (key, value))
    scores = (query.double() @ wide_key.transpose(-1, -2) * 0.3).masked_fill(~mask, float("-inf"))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), scores.softmax(-1) @ wide_value, atol=tolerance, rtol=tolerance)


def test_float32_is_known_everywhere() -> None:
    assert cpu_features.multiplies_in(torch.float32) and cpu_features.multiplies_in(torch.float64)


@pytest.mark.parametrize(
    ("capabilities", "bfloat16", "float16"),
    [({}, False, False), ({"avx512_bf16": True}, True, False), ({"amx_fp16": True, "amx_bf16": True}, True, True)],
)
def test_half_precision_by_what_the_processor_says(
    capabilities: dict[str, bool], bfloat16: bool, float16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_features, "_capabilities", lambda: capabilities)
    asked = cpu_features.multiplies_in.__wrapped__
    assert (asked(torch.bfloat16), asked(torch.float16)) == (bfloat16, float16)


@pytest.mark.parametrize(("vectors", "expected"), [("AVX2", False), ("AVX512", True), ("NO AVX", False)])
def test_float32_by_the_width_of_vectors(vectors: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(cpu_features, "multiplies_in", lambda dtype: dtype == torch.bfloat16)
    cpu_features._has_wide_vectors.cache_clear()
    found = [cpu_features.multiplies_fast(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    cpu_features._has_wide_vectors.cache_clear()
    assert found == [expected, True, False]


def test_older_torch_is_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_fp16_supported", raising=False)
    found = cpu_features._capabilities()
    assert found["avx512_bf16"] and not found["amx_fp16"]
