"""Paged attention with torch, against a reference that knows nothing of pages."""

import math

import pytest
import torch
from torch import Tensor

from engine.attention import AttentionMetadata, attention_backend, write_kv
from engine.attention.sdpa import SDPAttention

HEAD_DIM = 8
MIXED = ([1, 9, 1, 33, 4], [1, 9, 40, 33, 57])
"""Tokens of this step and tokens in all: first decode, whole prompts, decode, a later chunk."""


class Case:
    """Random sequences, whose tokens but the newest already lie in a cache that is otherwise full of other numbers."""

    def __init__(
        self,
        counts: list[int],
        lengths: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 4,
        block_size: int = 16,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.counts, self.lengths, self.block_size = counts, lengths, block_size
        needed = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(needed) + 5, generator=generator).tolist()
        self.blocks = [[order.pop() for _ in range(number)] for number in needed]
        self.unused = order
        table = torch.full((len(counts), max(needed)), order[0], dtype=torch.int32)
        for row, blocks in zip(table, self.blocks, strict=True):
            row[: len(blocks)] = torch.tensor(blocks)
        self.queries = [normal(count, heads, HEAD_DIM) for count in counts]
        self.keys = [normal(length, kv_heads, HEAD_DIM) for length in lengths]
        self.values = [normal(length, kv_heads, HEAD_DIM) for length in lengths]
        self.cache = normal(2, sum(needed) + 5, block_size, kv_heads, HEAD_DIM) * 100
        for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            for position in range(length - count):
                block, offset = self.place(i, position)
                self.cache[0, block, offset] = self.keys[i][position]
                self.cache[1, block, offset] = self.values[i][position]
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        self.metadata = AttentionMetadata(
            query_start=starts,
            seq_lens=lengths,
            query_start_dev=torch.tensor(starts, dtype=torch.int32),
            seq_lens_dev=torch.tensor(lengths, dtype=torch.int32),
            block_table=table,
            slot_mapping=torch.tensor(
                [
                    block * block_size + offset
                    for i, (count, length) in enumerate(zip(counts, lengths, strict=True))
                    for block, offset in (self.place(i, p) for p in range(length - count, length))
                ]
            ),
        )

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        return self.blocks[sequence][position // self.block_size], position % self.block_size

    def newest(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor[len(tensor) - count :] for tensor, count in zip(tensors, self.counts, strict=True)])

    def attend(self, *, scale: float = 0.3, window: int | None = None) -> Tensor:
        return SDPAttention().forward(
            torch.cat(self.queries),
            self.newest(self.keys),
            self.newest(self.values),
            self.cache,
            self.metadata,
            scale=scale,
            sliding_window=window,
        )

    def expected(self, *, scale: float = 0.3, window: int | None = None) -> Tensor:
        """One query, one head and one key after the other, in float64."""
        rows = []
        for query, keys, values in zip(self.queries, self.keys, self.values, strict=True):
            group = query.shape[1] // keys.shape[1]
            for number, token in enumerate(query):
                position = len(keys) - len(query) + number
                first = 0 if window is None else max(0, position - window + 1)
                for head, vector in enumerate(token.double()):
                    seen = range(first, position + 1)
                    scores = [float(vector @ keys[j, head // group].double()) * scale for j in seen]
                    weights = [math.exp(score - max(scores)) for score in scores]
                    mixed = sum(w * values[j, head // group].double() for w, j in zip(weights, seen, strict=True))
                    rows.append(mixed / sum(weights))
        return torch.stack([torch.as_tensor(row) for row in rows]).view(-1, self.queries[0].shape[1], HEAD_DIM)


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 24, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_mixed_batch(heads: int, kv_heads: int, window: int | None) -> None:
    case = Case(*MIXED, heads=heads, kv_heads=kv_heads)
    assert_equal(case.attend(window=window), case.expected(window=window))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("seed", range(6))
def test_random_batches(seed: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    lengths = torch.randint(1, 50, (4,), generator=generator).tolist()
    counts = [int(torch.randint(1, length + 1, (), generator=generator)) for length in lengths]
    case = Case(counts, lengths, kv_heads=2, block_size=(16, 32)[seed % 2], seed=seed)
    assert_equal(case.attend(window=window), case.expected(window=window))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("window", [None, 15, 16, 17])
def test_block_boundaries(length: int, window: int | None) -> None:
    for count in {1, length, (length + 1) // 2}:
        case = Case([count], [length])
        assert_equal(case.attend(window=window), case.expected(window=window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    case = Case(*MIXED, kv_heads=2, dtype=dtype)
    found = case.attend(window=24)
    assert found.dtype == dtype
    assert_equal(found, case.expected(window=24), 3e-2)


def test_alone_as_in_a_batch() -> None:
    case = Case(*MIXED, kv_heads=2)
    together = case.attend()
    for i, (count, length) in enumerate(zip(*MIXED, strict=True)):
        start = case.metadata.query_start[i]
        meta = case.metadata
        single = AttentionMetadata(
            query_start=[0, count],
            seq_lens=[length],
            query_start_dev=torch.tensor([0, count], dtype=torch.int32),
            seq_lens_dev=torch.tensor([length], dtype=torch.int32),
            block_table=meta.block_table[i : i + 1],
            slot_mapping=meta.slot_mapping[start : start + count],
        )
        tensors = (case.queries[i], case.keys[i][length - count :], case.values[i][length - count :])
        found = SDPAttention().forward(*tensors, case.cache, single, scale=0.3, sliding_window=None)
        assert torch.equal(found, together[start : start + count])


def test_only_the_slots_of_the_step_are_written() -> None:
    case = Case(*MIXED)
    before = case.cache.clone()
    case.attend()
    written = set(case.metadata.slot_mapping.tolist())
    changed = (case.cache != before).flatten(3).any(-1).flatten(1)
    assert {int(slot) for slot in changed[0].nonzero()} == {int(slot) for slot in changed[1].nonzero()} == written
    for i, length in enumerate(case.lengths):
        for position in range(length):
            assert torch.equal(case.cache[0][case.place(i, position)], case.keys[i][position])
            assert torch.equal(case.cache[1][case.place(i, position)], case.values[i][position])


def test_block_written_in_this_step_is_read_by_another_request() -> None:
    """Two prompts of which the second takes its first block from the first, which writes it in the same step."""
    case = Case([20, 4], [20, 20])
    case.keys[1][:16], case.values[1][:16] = case.keys[0][:16], case.values[0][:16]
    case.metadata.block_table[1, 0] = case.metadata.block_table[0, 0]
    assert_equal(case.attend(), case.expected())


def test_write_kv_takes_strided_keys() -> None:
    """The model cuts queries, keys and values out of one product, so that they are not contiguous."""
    cache = torch.zeros(2, 3, 16, 2, HEAD_DIM)
    fused = torch.randn(5, 6, HEAD_DIM)
    _, key, value = fused.split([2, 2, 2], dim=1)
    slots = torch.tensor([40, 3, 17, 0, 31])
    write_kv(key, value, cache, slots)
    assert torch.equal(cache[0].flatten(0, 1)[slots], key)
    assert torch.equal(cache[1].flatten(0, 1)[slots], value)
    assert cache.count_nonzero() == 2 * key.numel()


def test_cpu_gets_sdpa() -> None:
    assert isinstance(attention_backend(torch.device("cpu")), SDPAttention)
