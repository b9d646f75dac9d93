"""Training gives the same weights for the same seed."""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

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


def test_a_missing_photograph_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.batches._PHOTOS", (*batches._PHOTOS, "missing.png"))
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        batches.load_photos()
