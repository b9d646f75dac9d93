"""The Triton kernel against the torch reference."""

import pytest
import torch
from torch import Tensor

from engine.attention import AttentionBackend, AttentionMetadata
from engine.attention.sdpa import SDPAttention

BLOCK = 16


def metadata(counts: list[int], lengths: list[int], device: str) -> tuple[AttentionMetadata, int]:
    generator = torch.Generator().manual_seed(0)
    needed = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(needed) + 3, generator=generator).int()
    table = torch.zeros(len(counts), max(needed), dtype=torch.int32)
    starts, slots, used = [0], [], 0
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        table[i, : needed[i]] = order[used : used + needed[i]]
        used += needed[i]
        starts.append(starts[-1] + count)
        slots += [int(table[i, p // BLOCK]) * BLOCK + p % BLOCK for p in range(length - count, length)]
    made = AttentionMetadata(
        starts, lengths, torch.tensor(starts).int(), torch.tensor(lengths).int(), table, torch.tensor(slots)
    )
    for name in ("query_start_dev", "seq_lens_dev", "block_table", "slot_mapping"):
        setattr(made, name, getattr(made, name).to(device))
    return made, len(order)


def attend(backend: AttentionBackend, tensors: list[Tensor], meta: AttentionMetadata, window: int | None) -> Tensor:
    query, key, value, cache = (tensor.clone() for tensor in tensors)
    scale = query.shape[-1] ** -0.5
    return backend.forward(query, key, value, cache, meta, scale=scale, sliding_window=window)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (6, 1, 80), (2, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_reference(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int | None) -> None:
    from engine.attention.triton import TritonAttention

    counts, lengths = [1, 30, 1, 100, 7, 1], [1, 30, 50, 333, 64, 200]
    device_meta, blocks = metadata(counts, lengths, "cuda")
    host_meta, _ = metadata(counts, lengths, "cpu")
    generator = torch.Generator().manual_seed(1)
    shapes = [(sum(counts), heads), (sum(counts), kv_heads), (sum(counts), kv_heads), (2, blocks, BLOCK, kv_heads)]
    tensors = [torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes]
    expected = attend(SDPAttention(), [tensor.float() for tensor in tensors], host_meta, window)
    found = attend(TritonAttention(), [tensor.cuda() for tensor in tensors], device_meta, window)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float().cpu(), expected, atol=tolerance, rtol=tolerance)
