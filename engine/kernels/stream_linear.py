"""Products of up to 128 rows with a weight on a Hopper GPU: bound by the reading of the weight, which cuBLAS does
not do at full speed. The copy engine reads, several blocks ahead, and begins before the kernel before this one ends.
"""

import logging
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from engine.kernels.overlap import overlap, wait_for_inputs

try:  # Triton's lower level, which may change from one release to the next
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name before Triton 3.7, and since
except ImportError:
    gluon = None

logger = logging.getLogger(__name__)

MOST_ROWS = 128
_OUTPUTS = 64
"""Of one program: what one warp group multiplies at a time."""
_WARPS = 4
_LONG_INPUT = 8192
_FEW_TILES = 66
"""Half of an H100's multiprocessors: with no more, and much to read for each, two programs share a tile."""
_CUTS = ((16, 128, 8), (32, 128, 8), (64, 128, 6), (MOST_ROWS, 64, 8))
"""Rows of a program, inputs read at once, reads under way."""
_MOST_SUMS = _FEW_TILES * 2 * _OUTPUTS * MOST_ROWS


class StreamPlan(NamedTuple):
    """How the work is cut: rows that a program computes, inputs read at once, reads under way, programs a tile."""

    rows: int
    inputs: int
    stages: int
    parts: int


def plan(rows: int, size_in: int, size_out: int) -> StreamPlan | None:
    """What was found fastest on an H100 among the layers of a 7B model; None where the kernel cannot do the product."""
    width, inputs, stages = next(cut for cut in _CUTS if rows <= cut[0])
    parts = 2 if size_in >= _LONG_INPUT and triton.cdiv(size_out, _OUTPUTS) <= _FEW_TILES else 1
    is_whole = size_in % inputs == 0 and size_in // inputs // parts >= stages
    return StreamPlan(width, inputs, stages, parts) if is_whole else None


if gluon is not None:

    @gluon.jit  # type: ignore[untyped-decorator]
    def _read(weight, x, w_slots, x_slots, bars, slot, output, start, WEIGHT: gl.constexpr, INPUT: gl.constexpr):  # type: ignore[no-untyped-def]
        """Begin to fill a slot: with the weight, with the input, or with both."""
        if WEIGHT:
            mbarrier.expect(bars.index(slot), weight.block_type.nbytes + x.block_type.nbytes)
            tma.async_copy_global_to_shared(weight, [output, start], bars.index(slot), w_slots.index(slot))
        if INPUT:
            tma.async_copy_global_to_shared(x, [0, start], bars.index(slot), x_slots.index(slot))

    @gluon.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
    def _stream_linear(  # type: ignore[no-untyped-def]
        x, weight, output, partials, arrivals, num_rows, size_in, size_out,
        ROWS: gl.constexpr, OUTPUTS: gl.constexpr, INPUTS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
        OVERLAP: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """One program: some outputs of all rows, summed over one part of the inputs; who is last adds up the parts."""
        tile = gl.program_id(0)
        part = gl.program_id(1)
        blocks = size_in // INPUTS
        first = blocks * part // PARTS
        count = blocks * (part + 1) // PARTS - first
        out = tile * OUTPUTS
        w_slots = gl.allocate_shared_memory(weight.dtype, [STAGES, OUTPUTS, INPUTS], weight.layout)
        x_slots = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, INPUTS], x.layout)
        bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(bars.index(i), count=1)
        # `plan` sees to it that each part has at least so many blocks.
        for i in gl.static_range(STAGES):
            _read(weight, x, w_slots, x_slots, bars, i, out, (first + i) * INPUTS, True, False)
        wait_for_inputs(OVERLAP)
        for i in gl.static_range(STAGES):
            _read(weight, x, w_slots, x_slots, bars, i, out, (first + i) * INPUTS, False, True)
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
        sums = gl.zeros([OUTPUTS, ROWS], gl.float32, layout)
        slot = 0
        phase = 0
        for i in range(count):
            mbarrier.wait(bars.index(slot), phase)
            sums = warpgroup_mma(w_slots.index(slot), x_slots.index(slot).permute((1, 0)), sums, is_async=True)
            # The product before this one is done with its slot.
            sums = warpgroup_mma_wait(1, deps=(sums,))
            before = gl.where(slot == 0, STAGES - 1, slot - 1)
            if (i > 0) & (i - 1 + STAGES < count):
                _read(weight, x, w_slots, x_slots, bars, before, out, (first + i - 1 + STAGES) * INPUTS, True, True)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        # Threads side by side hold outputs side by side: each stores 16 bytes.
        LANES: gl.constexpr = OUTPUTS // 8
        flat: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, num_warps], [0, 1])
        if PARTS == 1:
            _store(gl.convert_layout(sums.to(output.dtype.element_ty), flat), output, out, num_rows, size_out, flat)
        else:
            SUMS: gl.constexpr = OUTPUTS * ROWS
            outs = gl.arange(0, OUTPUTS, gl.SliceLayout(1, layout))
            rows = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
            partial = partials + tile * (PARTS * SUMS)
            gl.store(partial + part * SUMS + outs[:, None] + rows[None, :] * OUTPUTS, sums)
            barrier()
            if gl.atomic_add(arrivals + tile, 1, sem="acq_rel") == PARTS - 1:
                flat_outs = gl.arange(0, OUTPUTS, gl.SliceLayout(1, flat))
                flat_rows = gl.arange(0, ROWS, gl.SliceLayout(0, flat))
                places = partial + flat_outs[:, None] + flat_rows[None, :] * OUTPUTS
                # In the order of the parts, whoever came last: the sum is always the same.
                total = gl.load(places, cache_modifier=".cg")
                for other in gl.static_range(1, PARTS):
                    total += gl.load(places + other * SUMS, cache_modifier=".cg")
                _store(total.to(output.dtype.element_ty), output, out, num_rows, size_out, flat)
                gl.store(arrivals + tile, 0)

    @gluon.jit  # type: ignore[untyped-decorator]
    def _store(result, output, out, num_rows, size_out, layout: gl.constexpr):  # type: ignore[no-untyped-def]
        """Store what lies within the output."""
        outs = out + gl.arange(0, result.shape[0], gl.SliceLayout(1, layout))
        rows = gl.arange(0, result.shape[1], gl.SliceLayout(0, layout))
        mask = (outs < size_out)[:, None] & (rows < num_rows)[None, :]
        gl.store(output + rows[None, :] * size_out + outs[:, None], result, mask=mask)


@lru_cache(maxsize=8)
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is there for this GPU; tried out in every form, since it stands on what may change."""
    if gluon is None or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        return all(_is_right(StreamPlan(*cut, parts), device, dtype) for cut in _CUTS for parts in (1, 2))
    except Exception as error:  # whatever another release of Triton may say
        logger.warning("products of 2 to 128 rows take cuBLAS: %s", str(error).partition("\n")[0][:200])
        return False


def _is_right(plan: StreamPlan, device: torch.device, dtype: torch.dtype) -> bool:
    """Whole numbers, whose sums are exact in any order, all rows but one, and outputs that fill no tile."""
    generator = torch.Generator().manual_seed(0)
    sizes = (plan.rows - 1, 2048), (_OUTPUTS + 8, 2048)
    x, weight = (torch.randint(-2, 3, size, generator=generator).float() for size in sizes)
    found = stream_linear(x.to(device, dtype), weight.to(device, dtype), plan)
    return torch.equal(found.cpu(), (x @ weight.T).to(dtype))


@lru_cache(maxsize=8)
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums of the parts, and how many have come of each tile: none between kernels. Kernels that the GPU does not put
    in order must not share it: there is one stream.
    """
    sums = torch.empty(_MOST_SUMS, dtype=torch.float32, device=device)
    return sums, torch.zeros(_FEW_TILES, dtype=torch.int32, device=device)


def stream_linear(x: Tensor, weight: Tensor, plan: StreamPlan) -> Tensor:
    """`x` (M, in), M at most `plan.rows`, times the transpose of `weight` (out, in), summed in float32."""
    rows, size_in = x.shape
    size_out = weight.shape[0]
    output = torch.empty(rows, size_out, dtype=x.dtype, device=x.device)
    partials, arrivals = _workspace(x.device)
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    tensors = []
    for tensor, height in ((x, plan.rows), (weight, _OUTPUTS)):
        block = [height, plan.inputs]
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        tensors.append(TensorDescriptor.from_tensor(tensor, block, layout))
    _stream_linear[(triton.cdiv(size_out, _OUTPUTS), plan.parts)](
        *tensors, output, partials, arrivals, rows, size_in, size_out,
        ROWS=plan.rows, OUTPUTS=_OUTPUTS, INPUTS=plan.inputs, PARTS=plan.parts, STAGES=plan.stages, num_warps=_WARPS,
        **overlap(x.device),
    )  # fmt: skip
    return output
