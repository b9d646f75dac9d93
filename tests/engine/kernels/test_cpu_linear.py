"""Compiled products of few rows."""

import pytest
import torch

from engine.kernels.cpu_linear import thin_linear, works_on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize(("size_out", "size_in"), [(1, 1), (3, 7), (32, 64), (65, 129)])
def test_product(size_out: int, size_in: int, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size_out + rows)
    x = torch.randn(rows, size_in, generator=generator).to(dtype)
    weight = torch.randn(size_out, size_in, generator=generator).to(dtype)
    found = thin_linear(x, weight)
    assert found.dtype == dtype
    exact = (x.double() @ weight.double().T).to(dtype)  # sums are made in float32 and rounded once
    torch.testing.assert_close(found, exact, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


def test_numbers_of_every_size() -> None:
    """Each bfloat16 and float16 is read as what it is: subnormal numbers, infinities and the largest."""
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        numbers = numbers[~numbers.isnan()].unsqueeze(1)
        assert torch.equal(thin_linear(torch.ones(1, 1), numbers), numbers.float().T)


def test_any_layout_of_what_is_multiplied() -> None:
    wide = torch.randn(8, 10)
    assert torch.equal(thin_linear(wide[::2, ::2], torch.eye(5)), wide[::2, ::2])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = torch.randn(5, 16), torch.randn(7, 16)
        torch.testing.assert_close(thin_linear(x, weight), x @ weight.T, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_what_it_leaves_to_torch() -> None:
    assert works_on(torch.zeros(3, 4))
    assert not works_on(torch.zeros(3, 4).T)
    assert not works_on(torch.zeros(3, 4, dtype=torch.float64))
