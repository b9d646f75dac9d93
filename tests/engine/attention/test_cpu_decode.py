"""Compiled attention of one token a request; `test_sdpa.py` compares whole batches."""

import pytest
import torch
from torch import Tensor

from engine.attention.cpu_decode import decode_attention, works_on


def expected(
    query: Tensor, cache: Tensor, table: Tensor, rows: Tensor, firsts: Tensor, ends: Tensor, scale: float
) -> Tensor:
    """Gathered, in float64."""
    outputs = []
    for i, vector in enumerate(query.double()):
        gathered = cache[:, table[rows[i]].long()].flatten(1, 2)[:, firsts[i] : ends[i]].double()
        keys, values = gathered.repeat_interleave(query.shape[1] // cache.shape[3], dim=2)
        weights = (torch.einsum("hd,thd->ht", vector, keys) * scale).softmax(-1)
        outputs.append(torch.einsum("ht,thd->hd", weights, values))
    return torch.stack(outputs)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1], [2], [3, 1, 40], [400], [1, 2, 3, 4, 5, 6, 7], [128, 129, 17, 300]])
def test_against_gathered(lengths: list[int], dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    number, longest = len(lengths), -(-max(lengths) // 16)
    cache = (torch.randn(2, number * longest + 3, 16, 2, 24, generator=generator)).to(dtype)
    table = torch.randperm(number * longest, generator=generator).int().view(number, longest)
    rows = torch.randperm(number, generator=generator)
    ends = torch.tensor(lengths)
    firsts = (ends - 20).clamp(min=0) if number % 2 else torch.zeros_like(ends)
    query = torch.randn(number, 6, 24, generator=generator).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = decode_attention(query, cache, table, rows, firsts, ends, scale=0.3)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    wanted = expected(query, cache, table, rows, firsts, ends, 0.3)
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


def test_alone_as_in_a_batch() -> None:
    """Digit for digit, on any number of threads."""
    generator = torch.Generator().manual_seed(1)
    ends, before = torch.tensor([500, 3, 129, 300, 128]), torch.get_num_threads()
    cache = torch.randn(2, 160, 16, 2, 24, generator=generator)
    table = torch.randperm(160, generator=generator).int().view(5, 32)
    query, rows, firsts = torch.randn(5, 4, 24, generator=generator), torch.arange(5), torch.zeros(5, dtype=torch.int64)
    together = decode_attention(query, cache, table, rows, firsts, ends, scale=0.3)
    torch.set_num_threads(3)
    try:
        for i in range(5):
            one = slice(i, i + 1)
            alone = decode_attention(query[one], cache, table, rows[one], firsts[one], ends[one], scale=0.3)
            assert torch.equal(alone, together[one])
    finally:
        torch.set_num_threads(before)


def test_scores_far_apart() -> None:
    """Softmax neither overflows nor divides nothing by nothing."""
    cache = torch.zeros(2, 1, 16, 1, 8)
    cache[0, 0, :, 0, 0] = torch.linspace(-1e4, 1e4, 16)
    cache[1, 0, :, 0] = torch.arange(16.0).unsqueeze(1)
    query = torch.zeros(1, 1, 8)
    query[0, 0, 0] = 1.0
    zero = torch.zeros(1, dtype=torch.int64)
    found = decode_attention(query, cache, torch.zeros(1, 1).int(), zero, zero, zero + 16, scale=1.0)
    torch.testing.assert_close(found, torch.full((1, 1, 8), 15.0))


def test_caches_it_reads() -> None:
    assert works_on(torch.zeros(1, dtype=torch.bfloat16))
    assert not works_on(torch.zeros(1).to(torch.float8_e4m3fn))
