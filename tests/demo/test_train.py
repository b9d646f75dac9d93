"""Training gives the same weights for the same seed."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from PIL import Image

from demo import batches
from demo.checkpoint import preprocessor_config
from demo.train import SPEC, Trainee, train
from engine.image_processor import ImageProcessor


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


PROCESSOR = ImageProcessor.from_dict(preprocessor_config(SPEC))


def untrained() -> Trainee:
    torch.manual_seed(0)
    return Trainee(PROCESSOR)


def trained() -> Trainee:
    """After two steps of a picture each."""
    args = argparse.Namespace(seed=0, steps=2, pictures=1, rate=1e-3, workers=0, report=1)
    model = untrained()
    train(model, args, PROCESSOR, torch.device("cpu"))
    return model


def weights(model: Trainee) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.usefixtures("deterministic")
def test_a_seed_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.batches.load_photos", tuple)
    monkeypatch.setattr("demo.batches.NUM_CHATS", 1)
    monkeypatch.setattr("demo.train.SPEC", replace(SPEC, vision_layers=2, num_hidden_layers=2))
    before, one, again = (weights(model) for model in (untrained(), trained(), trained()))
    assert one == again
    assert one != before


def test_a_missing_photograph_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With photographs left out, the same seed would give other pictures."""
    (tmp_path / "data").mkdir()
    found = ModuleSpec("skimage", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("demo.batches.find_spec", lambda name: found)
    for name in batches._PHOTOS[:-1]:
        Image.new("RGB", (2, 2)).save(tmp_path / "data" / name)
    with pytest.raises(FileNotFoundError, match=re.escape(batches._PHOTOS[-1])):
        batches.load_photos()
    Image.new("RGB", (2, 2)).save(tmp_path / "data" / batches._PHOTOS[-1])
    assert len(batches.load_photos()) == len(batches._PHOTOS)
    monkeypatch.setattr("demo.batches.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="train"):
        batches.load_photos()
