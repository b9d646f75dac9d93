"""The attention kernels against the torch reference.

They also run without a GPU, slowly, where triton is installed and TRITON_INTERPRET=1 is set.
"""

import pytest
import torch
from torch import Tensor

from engine.attention import AttentionMetadata, tile_tokens
from engine.attention.sdpa import SDPAttention
from tests.gpu.conftest import DEVICE, INTERPRETS

BLOCK = 16
ROWS = 9


def metadata(counts: list[int], lengths: list[int], tile: int, device: str) -> tuple[AttentionMetadata, int]:
    """Of requests with this many new tokens and this length; those with one token must come first."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(needed) + 3, generator=generator).int()
    table = torch.zeros(ROWS, max(needed), dtype=torch.int32)
    rows = torch.randperm(ROWS, generator=generator)[: len(counts)].tolist()
    starts, used = [0], 0
    for row, count, blocks in zip(rows, counts, needed, strict=True):
        table[row, :blocks] = order[used : used + blocks]
        used += blocks
        starts.append(starts[-1] + count)
    positions = torch.cat([torch.arange(n - count, n) for count, n in zip(counts, lengths, strict=True)]).int()
    decodes = counts.count(1)
    prefills = torch.tensor([starts[decodes:-1], counts[decodes:], lengths[decodes:], rows[decodes:]]).int()
    owners = torch.repeat_interleave(torch.tensor(rows), torch.tensor(counts)).int()
    pairs = [(i, first) for i, count in enumerate(counts[decodes:]) for first in range(0, count, tile)]
    tiles = torch.tensor(pairs, dtype=torch.int32).view(-1, 2).T.contiguous()
    tensors = [tensor.to(device) for tensor in (owners, positions, positions, table, prefills, tiles)]
    return AttentionMetadata(decodes, starts, lengths, rows, *tensors), len(order)


def check(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    window: int | None,
    counts: list[int],
    lengths: list[int],
    *,
    counted: bool = False,
    shared: tuple[int, int] | None = None,
    fp8: bool = False,
) -> None:
    """`shared`: so many of the first decodes begin with so many of the first one's tokens. `fp8`: the cache is.

    Then all turns are by right angles, so that both sides round the same keys.
    """
    from engine.attention.triton import TritonAttention

    heads, kv_heads, head_dim = shape
    tile = tile_tokens(heads, kv_heads, dtype)
    device_meta, blocks = metadata(counts, lengths, tile, DEVICE)
    host_meta, _ = metadata(counts, lengths, tile, "cpu")
    if shared is not None:
        members, length = shared
        for meta in (device_meta, host_meta):
            meta.block_table[host_meta.rows[1:members], : length // BLOCK] = meta.block_table[
                host_meta.rows[0], : length // BLOCK
            ]
        device_meta.shared = torch.tensor([members, length, host_meta.rows[0]]).int().to(DEVICE)
    if counted:
        device_meta.counts = torch.tensor([device_meta.num_decodes, device_meta.tiles.shape[1]]).int().to(DEVICE)
        device_meta.num_decodes = len(counts)
        device_meta.tiles = torch.nn.functional.pad(device_meta.tiles, (0, 3))
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(sum(counts), heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    cache = torch.randn(2, blocks, BLOCK, kv_heads, head_dim, generator=generator).to(dtype)
    angles = torch.rand(max(lengths), head_dim // 2, generator=generator) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    scales = None
    if fp8:
        cos, sin = cos.round(), sin.round() * (cos.round() == 0)
        scales = 2.0 ** torch.randint(-7, -4, (2, kv_heads), generator=generator)
        cache = (cache * 50).to(torch.float8_e4m3fn)

    def attend(backend: object, meta: AttentionMetadata, tensors: list[Tensor]) -> Tensor:
        kv_scales = None if scales is None else scales.to(tensors[0].device)
        found: Tensor = backend.forward(  # type: ignore[attr-defined]
            *tensors, meta, scale=head_dim**-0.5, sliding_window=window, kv_scales=kv_scales
        )
        return found

    inputs = [qkv, cos, sin, cache]
    on_host = [tensor.float().clone() for tensor in inputs[:3]] + [cache.clone() if fp8 else cache.float()]
    on_device = [tensor.to(DEVICE).clone() for tensor in inputs]
    expected = attend(SDPAttention(), host_meta, on_host)
    found = attend(TritonAttention(), device_meta, on_device)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float().cpu(), expected, atol=tolerance, rtol=tolerance)
    written = 0.0 if fp8 else tolerance
    torch.testing.assert_close(on_device[3].float().cpu(), on_host[3].float(), atol=written, rtol=written)


COUNTS = [1, 1, 1, 30, 100, 7]
LENGTHS = [1, 50, 200, 30, 333, 64]
# The interpreter knows no products of bfloat16.
DTYPES = [torch.float32, torch.float16] if INTERPRETS else [torch.float32, torch.float16, torch.bfloat16]
# With an fp8 cache they are made in float16.
FP8_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(4, 4, 64), (8, 2, 128), (6, 1, 80), (2, 2, 16)]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("shape", SHAPES[1:3] if INTERPRETS else SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_batch(dtype: torch.dtype, shape: tuple[int, int, int], window: int | None, counted: bool) -> None:
    """Counted: as in a CUDA graph, which has room for more requests and tiles than there are."""
    check(dtype, shape, window, COUNTS, LENGTHS, counted=counted)


def test_counted_batches_without_decodes_or_without_prefills() -> None:
    check(torch.float32, (4, 2, 32), None, [20, 70], [30, 70], counted=True)
    check(torch.float32, (4, 2, 32), None, [1, 1, 1], [30, 70, 1], counted=True)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", [(4, 4, 64), (8, 2, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_decodes(dtype: torch.dtype, shape: tuple[int, int, int], window: int | None) -> None:
    check(dtype, shape, window, [1] * 5, [900, 1, 17, 16, 333])


@pytest.mark.parametrize("splits", [1, 2, 8, 16])
def test_any_number_of_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.attention import triton_decode

    plan = triton_decode.DecodePlan(splits, 32, 4)
    monkeypatch.setattr(triton_decode, "plan", lambda *args, **settings: plan)
    for shape in ((4, 4, 32), (4, 1, 32)):
        check(torch.float32, shape, None, [1] * 4, [300, 1, 31, 257])


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("shape", [(4, 4, 32), (8, 2, 16)])
@pytest.mark.parametrize("shared", [(0, 0), (3, 32), (5, 240), (4, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shared_beginning_is_read_once(
    dtype: torch.dtype, shared: tuple[int, int], shape: tuple[int, int, int], counted: bool
) -> None:
    lengths = [300, 257, 290, 400, 241, 3, 20, 50] if shared != (0, 0) else [300, 2, 3, 4, 5, 6, 20, 50]
    check(dtype, shape, None, [1] * 6 + [20, 7], lengths, counted=counted, shared=shared)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", SHAPES[1:3] if INTERPRETS else SHAPES)
@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_fp8_mixed_batch(dtype: torch.dtype, shape: tuple[int, int, int], window: int | None, counted: bool) -> None:
    check(dtype, shape, window, COUNTS, LENGTHS, counted=counted, fp8=True)


@pytest.mark.parametrize("shape", [(4, 4, 64), (8, 2, 128)])
@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_fp8_only_decodes(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Few and long: each is split. Many: none is."""
    check(dtype, shape, None, [1] * 2, [900, 333], fp8=True)
    check(dtype, shape, None, [1] * 9, [70, 1, 17, 16, 100, 5, 31, 32, 33], fp8=True)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("shared", [(3, 32), (5, 240)])
@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_fp8_shared_beginning(dtype: torch.dtype, shared: tuple[int, int], counted: bool) -> None:
    lengths = [300, 257, 290, 400, 241, 3, 20, 50]
    check(dtype, (8, 2, 16), None, [1] * 6 + [20, 7], lengths, counted=counted, shared=shared, fp8=True)
