"""Paged attention with torch, against a reference that knows nothing of pages."""

import math

import pytest
import torch
from torch import Tensor

from engine.attention import AttentionMetadata, attention_backend, sdpa
from engine.attention.sdpa import SDPAttention

HEAD_DIM = 8
MIXED = ([1, 9, 1, 33, 4], [1, 9, 40, 33, 57])
"""Tokens of this step and tokens in all: first decode, whole prompts, decode, a later chunk."""


def metadata(
    starts: list[int], lengths: list[int], rows: list[int], owners: list[int], positions: list[int], table: Tensor
) -> AttentionMetadata:
    """The CPU needs no order of requests, and looks at no `prefills` and `tiles`."""
    tokens, places = torch.tensor(owners).int(), torch.tensor(positions).int()
    empty = torch.zeros(4, 0).int()
    return AttentionMetadata(0, starts, lengths, rows, tokens, places, places, table, empty, empty)


def attend(
    qkv: Tensor,
    cache: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float = 0.3,
    window: int | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Attention with rotations by no angle at all."""
    cos, sin = torch.ones(100, HEAD_DIM // 2, dtype=qkv.dtype), torch.zeros(100, HEAD_DIM // 2, dtype=qkv.dtype)
    return SDPAttention().forward(qkv, cos, sin, cache, meta, scale=scale, sliding_window=window, kv_scales=scales)


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
        positions = [range(length - count, length) for count, length in zip(counts, lengths, strict=True)]
        owners = [i for i, count in enumerate(counts) for _ in range(count)]
        self.written = {
            block * block_size + offset
            for i, some in enumerate(positions)
            for block, offset in (self.place(i, p) for p in some)
        }
        rows = list(range(len(counts)))
        self.metadata = metadata(starts, lengths, rows, owners, [p for some in positions for p in some], table)

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        return self.blocks[sequence][position // self.block_size], position % self.block_size

    def newest(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor[len(tensor) - count :] for tensor, count in zip(tensors, self.counts, strict=True)])

    def attend(self, *, scale: float = 0.3, window: int | None = None, scales: Tensor | None = None) -> Tensor:
        qkv = torch.cat((torch.cat(self.queries), self.newest(self.keys), self.newest(self.values)), dim=1)
        return attend(qkv, self.cache, self.metadata, scale=scale, window=window, scales=scales)

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


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def without_numba(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything again as it is where numba is not installed."""
    if request.param == "torch":
        monkeypatch.setattr(sdpa, "runs_compiled", lambda: False)
    else:
        assert sdpa.runs_compiled()


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
        single = metadata(
            [0, count], [length], [i], [i] * count, list(range(length - count, length)), case.metadata.block_table
        )
        newest = (case.queries[i], case.keys[i][length - count :], case.values[i][length - count :])
        found = attend(torch.cat(newest, dim=1), case.cache, single)
        assert torch.equal(found, together[start : start + count])


def test_only_the_slots_of_the_step_are_written() -> None:
    case = Case(*MIXED)
    before = case.cache.clone()
    case.attend()
    changed = (case.cache != before).flatten(3).any(-1).flatten(1)
    assert {int(slot) for slot in changed[0].nonzero()} == {int(slot) for slot in changed[1].nonzero()} == case.written
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


def test_queries_and_keys_are_rotated_by_their_own_angles() -> None:
    """Turning both by the same angle changes no score; what is written is turned, and values are not."""
    case = Case([1], [1], heads=2, kv_heads=1)
    qkv = torch.cat((case.queries[0], case.keys[0], case.values[0]), dim=1)
    angles = torch.tensor([0.0, 0.3, 1.0, 2.0]).expand(100, -1)
    found = SDPAttention().forward(
        qkv.clone(),
        angles.cos(),
        angles.sin(),
        case.cache,
        case.metadata,
        scale=1.0,
        sliding_window=None,
        kv_scales=None,
    )
    block, offset = case.place(0, 0)
    key = case.keys[0][0, 0].double()
    turned = [key[i] * math.cos(a) - key[i + 4] * math.sin(a) for i, a in enumerate(angles[0].tolist())]
    turned += [key[i + 4] * math.cos(a) + key[i] * math.sin(a) for i, a in enumerate(angles[0].tolist())]
    torch.testing.assert_close(case.cache[0, block, offset, 0].double(), torch.stack(turned), atol=1e-6, rtol=1e-6)
    assert torch.equal(case.cache[1, block, offset], case.values[0][0])
    torch.testing.assert_close(found[0], case.values[0].expand(1, 2, -1)[0])


def fp8(x: Tensor, scales: Tensor) -> Tensor:
    """(…, kv_heads, head_dim) as an fp8 cache holds it."""
    return (x.float() / scales.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)


def read(x: Tensor, scales: Tensor) -> Tensor:
    """What that stands for."""
    return x.float() * scales.unsqueeze(-1)


def with_fp8_cache(case: Case) -> Tensor:
    """Make it have one, whose scales are returned."""
    scales = 2.0 ** torch.arange(-8, 0).view(2, -1)[:, : case.keys[0].shape[1]]
    case.cache = torch.stack([fp8(x, some) for x, some in zip(case.cache, scales, strict=True)])
    return scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5, 24])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_fp8_is_attention_to_rounded_keys_and_values(
    heads: int, kv_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    case = Case(*MIXED, heads=heads, kv_heads=kv_heads, dtype=dtype)
    scales = with_fp8_cache(case)
    found = case.attend(window=window, scales=scales)
    assert found.dtype == dtype
    case.keys = [read(fp8(keys, scales[0]), scales[0]) for keys in case.keys]
    case.values = [read(fp8(values, scales[1]), scales[1]) for values in case.values]
    assert_equal(found, case.expected(window=window), 1e-5 if dtype == torch.float32 else 3e-2)


def test_fp8_writes_only_the_slots_of_the_step() -> None:
    case = Case(*MIXED, kv_heads=2)
    scales = with_fp8_cache(case)
    before = case.cache.view(torch.uint8).clone()
    case.attend(scales=scales)
    changed = (case.cache.view(torch.uint8) != before).flatten(3).any(-1).flatten(1)
    assert {int(slot) for slot in changed[0].nonzero()} == {int(slot) for slot in changed[1].nonzero()} == case.written
    for i, length in enumerate(case.lengths):
        for position in range(length):
            for cache, of_all, some in zip(case.cache, (case.keys, case.values), scales, strict=True):
                assert torch.equal(cache[case.place(i, position)].float(), fp8(of_all[i][position], some).float())


def test_fp8_cuts_off_what_is_too_large() -> None:
    case = Case([3], [3], kv_heads=1)
    case.keys[0][0], case.keys[0][1], case.values[0][2] = 1e9, -1e9, float("inf")
    scales = with_fp8_cache(case)
    assert case.attend(scales=scales).isfinite().all()
    block = case.cache[:, case.blocks[0][0]].float()
    assert (block[0, 0] == 448).all() and (block[0, 1] == -448).all() and (block[1, 2] == 448).all()


def test_cpu_gets_sdpa() -> None:
    assert isinstance(attention_backend(torch.device("cpu")), SDPAttention)
