"""Decoding of untrusted image files."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.image_decode import ImageError, decode_image, to_rgb

LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (16, 8), left)
    image.paste(right, (8, 0, 16, 8))
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_allowed_format(kind: str) -> None:
    decoded = decode_image(encoded(halves((255, 0, 0), (0, 0, 255)), kind), max_pixels=LIMIT)
    assert decoded.mode == "RGB"
    assert decoded.size == (16, 8)
    red, blue = np.asarray(decoded)[4, 2], np.asarray(decoded)[4, 13]
    assert red[0] > 200 > 60 > red[2]
    assert blue[2] > 200 > 60 > blue[0]


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "PCX", "EPS", "PDF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="JPEG, PNG, WebP, GIF, BMP or TIFF"):
        decode_image(encoded(Image.new("RGB", (16, 16)), kind), max_pixels=LIMIT)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF\0\0\0\0WEBP"])
def test_rubbish_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data, max_pixels=LIMIT)
    assert "0x" not in str(caught.value)
    assert "/" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_truncated_files_are_refused(kind: str, photos: list[Image.Image]) -> None:
    data = encoded(photos[0].resize((200, 100)), kind)
    with pytest.raises(ImageError):
        decode_image(data[: len(data) // 2], max_pixels=LIMIT)


def test_pixels_are_checked_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (2000, 1000)), "PNG")

    def load(*_: object) -> None:
        pytest.fail("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ImageError, match=r"2000x1000.*1000000"):
        decode_image(data, max_pixels=LIMIT)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])  # of which one has its size in a head of its own
def test_webp_may_have_half_of_the_default(mode: str) -> None:
    """What PIL copies in one go holds up all threads."""
    data = encoded(Image.new(mode, (8192, 4097)), "WEBP", lossless=True, quality=0, method=0)
    with pytest.raises(ImageError, match=r"8192x4097.*33554432"):
        decode_image(data, max_pixels=1 << 26)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 10))  # a bright corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(image, kind, exif=exif), max_pixels=LIMIT)
    assert decoded.size == ((40, 20) if orientation < 5 else (20, 40))
    width, height = decoded.size
    quarters = {
        (x, y): np.asarray(decoded)[height * (1 + 2 * y) // 4, width * (1 + 2 * x) // 4, 0] > 128
        for x in (0, 1)
        for y in (0, 1)
    }
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    assert [place for place, bright in quarters.items() if bright] == [corner]


def test_transparency_is_flattened_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(decode_image(encoded(image, "PNG"), max_pixels=LIMIT)).min() == 255
    half = decode_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG"), max_pixels=LIMIT)
    assert abs(int(np.asarray(half)[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert np.asarray(decode_image(encoded(palette, "PNG", transparency=1), max_pixels=LIMIT)).min() == 255


def test_palettes_and_cmyk_become_rgb() -> None:
    palette = halves((255, 0, 0), (0, 255, 0)).quantize(4)
    assert np.asarray(decode_image(encoded(palette, "PNG"), max_pixels=LIMIT))[0, 0, 0] > 200
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = np.asarray(decode_image(encoded(cmyk, "JPEG"), max_pixels=LIMIT))[4, 4]
    assert red[0] > 200 > 60 > red[1]


def test_grey_of_16_bits_is_scaled() -> None:
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values), "PNG"), max_pixels=LIMIT)
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 100, 255]


def test_first_frame_only() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(data, max_pixels=LIMIT))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (5, 3))).mode == "RGB"


def test_scan_bombs_are_refused(photos: list[Image.Image]) -> None:
    file = io.BytesIO()
    photos[0].save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    assert decode_image(whole, max_pixels=10**7).size == photos[0].size
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="too many scans"):
        decode_image(whole[:-2] + scan * 100 + b"\xff\xd9", max_pixels=10**7)
