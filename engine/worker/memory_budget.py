"""How much memory is left for the KV cache."""

import logging
from collections.abc import Callable

import psutil
import torch

logger = logging.getLogger(__name__)

_CPU_BYTES = 4 << 30
_CPU_SHARE = 0.25
_MOST_OF_FREE = 0.97
"""The rest is for what nobody foresees: memory in pieces, kernels that are loaded late."""


class GpuBudget:
    """A share of a GPU's memory, of which is taken what is loaded after this was made.

    What lies there before, CUDA's own context and what other programs hold, leaves less than the share only where not
    so much is free.

    Args:
        share: of the whole, above 0, at most 1.
    """

    def __init__(self, share: float) -> None:
        torch.cuda.empty_cache()
        self._free, total = torch.cuda.mem_get_info()
        self._reserved, self._allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        self._limit = int(min(total * share, self._free * _MOST_OF_FREE))
        if self._free < total * share:
            free, asked = self._free / 2**30, total * share / 2**30
            logger.warning("only %.1f GiB of the GPU are free: --gpu-memory-utilization asks for %.1f", free, asked)

    def left(self) -> int:
        """Bytes of it that are not taken yet."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        # Libraries' programs and workspaces.
        beside_torch = self._free - free - (torch.cuda.memory_reserved() - self._reserved)
        return self._limit - beside_torch - (torch.cuda.memory_allocated() - self._allocated)


def peak_bytes(run: Callable[[], object]) -> int:
    """What a function takes of the GPU's memory at most, beside what lies there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_bytes() -> int:
    """For the cache of a CPU: a part of what is free, and no more than a cache needs there."""
    return min(_CPU_BYTES, int(psutil.virtual_memory().available * _CPU_SHARE))
