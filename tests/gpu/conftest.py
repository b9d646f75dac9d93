"""Tests that need a GPU are skipped where there is none."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

INTERPRETS = not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1" and bool(find_spec("triton"))
"""Whether kernels can be run, slowly, on the CPU."""
DEVICE = "cpu" if INTERPRETS else "cuda"
_INTERPRETED = ("test_attention.py", "test_kernels.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and not (INTERPRETS and item.path.name in _INTERPRETED):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
