"""Fixtures that many tests share."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import sklearn.datasets
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the Hub is wrong; those of the Hub bring their own

import torch

from tests.random_checkpoint import CheckpointSpec, build_checkpoint

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Builds each kind of checkpoint once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(spec: CheckpointSpec = CheckpointSpec()) -> Path:
        path = folder / hashlib.sha256(repr(spec).encode()).hexdigest()[:16]
        return path if path.exists() else build_checkpoint(path, spec)

    return make


@pytest.fixture(scope="session")
def photo_files() -> list[Path]:
    """The two photographs that scikit-learn ships."""
    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]


@pytest.fixture(scope="session")
def photos(photo_files: list[Path]) -> list[Image.Image]:
    """They, decoded."""
    return [Image.open(file).convert("RGB") for file in photo_files]
