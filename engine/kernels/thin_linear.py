"""Products of few rows with a weight: bound by the reading of the weight, which cuBLAS does not do at full speed."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.overlap import overlap, wait_for_inputs

MOST_ROWS = 16


@dataclass(frozen=True, slots=True)
class ThinPlan:
    """How the work is cut: outputs of one program, inputs read at once."""

    outputs: int
    inputs: int
    warps: int
    stages: int


def plan(rows: int) -> ThinPlan:
    """What was found fastest on an H100 in the graph of a 7B model's decode step."""
    if rows > 1:
        return ThinPlan(outputs=64, inputs=256, warps=4, stages=3)
    return ThinPlan(outputs=4, inputs=2048, warps=8, stages=1)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _thin_linear(  # type: ignore[no-untyped-def]
    x, weight, output, num_rows, size_in, size_out,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: some outputs of all rows."""
    outs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    ins = tl.arange(0, INPUTS)
    rows = tl.arange(0, ROWS)
    weights = weight + outs[:, None].to(tl.int64) * size_in + ins[None, :]
    out_mask = outs < size_out
    if ROWS == 1:
        # The first part of the weight is on its way while the kernel before this one ends.
        if EVEN:
            w = tl.load(weights, eviction_policy="evict_first")
        else:
            w = tl.load(weights, mask=out_mask[:, None] & (ins < size_in)[None, :], other=0.0)
        wait_for_inputs(OVERLAP)
        v = tl.load(x + ins, mask=ins < size_in, other=0.0)
        sums = w.to(tl.float32) * v.to(tl.float32)[None, :]
        for start in tl.range(INPUTS, size_in, INPUTS, num_stages=STAGES):
            in_mask = ins < size_in - start
            if EVEN:
                w = tl.load(weights + start, eviction_policy="evict_first")
            else:
                w = tl.load(weights + start, mask=out_mask[:, None] & in_mask[None, :], other=0.0)
            v = tl.load(x + start + ins, mask=in_mask, other=0.0)
            sums += w.to(tl.float32) * v.to(tl.float32)[None, :]
        tl.store(output + outs, tl.sum(sums, 1).to(output.dtype.element_ty), mask=out_mask)
    else:
        wait_for_inputs(OVERLAP)
        sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for start in tl.range(0, size_in, INPUTS, num_stages=STAGES):
            in_mask = ins < size_in - start
            if EVEN:
                w = tl.load(weights + start, eviction_policy="evict_first")
            else:
                w = tl.load(weights + start, mask=out_mask[:, None] & in_mask[None, :], other=0.0)
            v_mask = in_mask[:, None] & (rows < num_rows)[None, :]
            v = tl.load(x + rows[None, :] * size_in + (start + ins)[:, None], mask=v_mask, other=0.0)
            sums = tl.dot(w, v, sums)
        mask = out_mask[:, None] & (rows < num_rows)[None, :]
        tl.store(output + rows[None, :] * size_out + outs[:, None], sums.to(output.dtype.element_ty), mask=mask)


def thin_linear(x: Tensor, weight: Tensor, plan: ThinPlan) -> Tensor:
    """`x` (M, in), M at most `MOST_ROWS`, times the transpose of `weight` (out, in), summed in float32."""
    rows, size_in = x.shape
    size_out = weight.shape[0]
    output = torch.empty(rows, size_out, dtype=x.dtype, device=x.device)
    _thin_linear[(triton.cdiv(size_out, plan.outputs),)](
        x, weight, output, rows, size_in, size_out,
        ROWS=1 if rows == 1 else MOST_ROWS, OUTPUTS=plan.outputs, INPUTS=plan.inputs,
        EVEN=size_in % plan.inputs == 0 and size_out % plan.outputs == 0, STAGES=plan.stages, num_warps=plan.warps,
        **overlap(x.device),
    )  # fmt: skip
    return output
