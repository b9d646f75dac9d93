"""The pictures that ship with the model are those that the generator draws."""

import numpy as np
import pytest
from PIL import Image

from demo.make_samples import FOLDER, SAMPLES, make_sample


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_can_be_drawn_again(name: str) -> None:
    with Image.open(FOLDER / name) as file:
        shipped = np.asarray(file.convert("RGB"), np.int16)
    difference = np.abs(shipped - np.asarray(make_sample(name), np.int16))
    assert difference.max() == 0 if name.endswith(".png") else difference.mean() < 2


def test_nothing_else_ships() -> None:
    assert {file.name for file in FOLDER.iterdir()} == set(SAMPLES)
