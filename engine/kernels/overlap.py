"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits only for its results."""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

_FIRST_CAPABILITY = (9, 0)


@lru_cache(maxsize=8)
def overlap(device: torch.device) -> dict[str, Any]:
    """Arguments of a kernel that calls `wait_for_inputs(OVERLAP)`."""
    if device.type == "cpu" or torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_inputs(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel start, and wait until the one before is done. Only constants may be read earlier; every
    kernel waits, so that what was written two kernels ago is there too.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
