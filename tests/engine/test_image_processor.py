"""Prepared images equal those of Hugging Face's PIL image processor, bit for bit."""

import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from engine.image_processor import ImageProcessor, image_hash

BASE: dict[str, Any] = {
    "crop_size": {"height": 56, "width": 56},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 56},
}
SIDES = [1, 2, 13, 55, 56, 57, 100, 333]


def picture(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


def check(described: dict[str, Any], image: Image.Image) -> None:
    ours = ImageProcessor.from_dict(described)
    pixels = ours.prepare(image)
    raw = CLIPImageProcessorPil(**{**described, "do_rescale": False, "do_normalize": False})
    expected = raw(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (ours.output_shape[1], ours.output_shape[2], 3)
    np.testing.assert_array_equal(pixels, expected)
    normalized = CLIPImageProcessorPil(**described)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(ours.normalize(pixels), normalized, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), list(itertools.product(SIDES, SIDES)))
def test_equals_hugging_face_on_many_sizes(width: int, height: int) -> None:
    check(BASE, picture(width, height))


@pytest.mark.parametrize("resample", [0, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 56, "width": 56}, "do_center_crop": False},
        {"size": {"shortest_edge": 64}},
        {"size": {"shortest_edge": 32}},
        {"do_resize": False},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    ],
)
def test_equals_hugging_face_with_other_settings(changes: dict[str, Any], resample: int) -> None:
    for size in ((90, 61), (40, 200)):
        check({**BASE, **changes, "resample": resample}, picture(*size))


def test_equals_hugging_face_on_photographs(photos: list[Image.Image]) -> None:
    for photo in photos:
        check({**BASE, "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}, photo)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type"),
        ({"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"do_pad": True}, "do_pad"),
        ({"resample": 9}, "resample"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std"),
        ({"crop_size": {"height": 0, "width": 5}}, "crop_size"),
    ],
)
def test_what_cannot_be_served_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ImageProcessor.from_dict({**BASE, **changes})


def test_extreme_shapes_take_little_memory() -> None:
    pixels = ImageProcessor.from_dict(BASE).prepare(Image.new("RGB", (60_000, 1), (10, 20, 30)))
    assert (pixels == (10, 20, 30)).all()


def test_hash_covers_pixels_shape_type_and_preprocessing() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    other = pixels.copy()
    other[3, 5, 2] = 1
    hashes = {
        image_hash(pixels, b"key"),
        image_hash(other, b"key"),
        image_hash(pixels.reshape(6, 4, 3), b"key"),
        image_hash(pixels.view(np.int8), b"key"),
        image_hash(pixels, b"other key"),
    }
    assert len(hashes) == 5
    assert image_hash(pixels, b"key") == image_hash(pixels.copy(), b"key")
