"""What this processor can do."""

from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch


@cache
def runs_compiled() -> bool:
    """Whether numba is there, and its loops can run on torch's threads."""
    if not find_spec("numba"):
        return False
    from engine.kernels.cpu_tasks import is_usable

    return is_usable()


@lru_cache(maxsize=8)
def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions that multiply numbers of this type; else torch converts each number."""
    if dtype.itemsize > 2:
        return True
    names = ("amx_bf16", "avx512_bf16") if dtype == torch.bfloat16 else ("amx_fp16", "avx512_fp16")
    capabilities = _capabilities()
    return any(capabilities.get(name) for name in names)


def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether torch multiplies few rows as fast as can be: in half precision where there are instructions for it, else
    where vectors have 512 bits. Measured on an Intel Xeon with AMX, and on an AMD EPYC without any of it.
    """
    return multiplies_in(dtype) if dtype.itemsize == 2 else _has_wide_vectors()


@lru_cache(maxsize=1)
def _has_wide_vectors() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def _capabilities() -> dict[str, Any]:
    """Newer versions of torch tell everything; older ones only this much, and only by private functions."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    asked = {
        "amx_bf16": "_is_amx_tile_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx_fp16": "_is_amx_fp16_supported",
    }
    return {name: bool(getattr(torch.cpu, function, bool)()) for name, function in asked.items()}
