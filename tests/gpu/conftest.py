"""Tests that need a GPU are skipped where there is none."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETS = not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1" and bool(find_spec("triton"))
"""Whether kernels can be run, slowly, on the CPU."""
DEVICE = "cpu" if INTERPRETS else "cuda"
_INTERPRETED = ("test_attention.py", "test_kernels.py")


def _convert_by_torch() -> None:
    """Let the interpreter convert from and to fp8 as GPUs do: it makes half of some numbers when it rounds them up."""
    import numpy as np
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    types = {"fp8e4nv": torch.float8_e4m3fn, "fp16": torch.float16, "fp32": torch.float32}

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if "fp8e4nv" not in (str(source), str(target)):
            return convert(data, source, target, rounding)
        raw = torch.from_numpy(np.ascontiguousarray(data)).view(types[str(source)])
        bits = torch.uint8 if str(target) == "fp8e4nv" else torch.int16 if str(target) == "fp16" else torch.int32
        return raw.to(types[str(target)]).view(bits).numpy()

    interpreter._convert_float = converted


if INTERPRETS:
    _convert_by_torch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and not (INTERPRETS and item.path.name in _INTERPRETED):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
