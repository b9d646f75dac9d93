"""Decoding of untrusted image files into RGB.

Only six formats are tried, the size is checked from the header before any pixel is decoded, and every failure becomes
an ``ImageError`` whose text may be shown to a client.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, _imaging
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from engine.image_structure import MOST_EXIF_BYTES, is_too_intricate, num_scans

# libtiff writes a line to stderr for each row that is damaged, which would fill a log; PIL has no switch for that.
with contextlib.suppress(OSError, AttributeError):  # builds without libtiff, or with one inside that cannot be reached
    for _name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        getattr(ctypes.CDLL(_imaging.__file__), _name)(None)


class ImageError(ValueError):
    """An image that cannot be used; the message is fit for a client."""


_NOT_DECODED = "the image could not be decoded"
_EXIF_ORIENTATION = 0x0112
_MOST_SCANS = 64
"""Of a progressive JPEG, which has about ten. Each is decoded over the whole picture, however few bytes it has."""
_MOST_RUN_LENGTH_PIXELS = 1 << 22
"""Of a BMP in run-length encoding, which PIL decodes pixel by pixel in Python, however few bytes they have."""
_MOST_WEBP_PIXELS = 1 << 25
"""PIL copies them all at once, during which no other thread of Python's runs: 0.15 s for twice as many."""
_LONGEST_SIDE = 1 << 20
"""PIL has a pointer for each row, which for a picture one pixel wide take more memory than the pixels."""
_BAND_PIXELS = 1 << 20
"""Greys of more than 8 bits are scaled so many at a time: as float64 a whole picture might not fit into memory."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode the first frame of an image file to an upright RGB image without transparency.

    Takes JPEG, PNG, WebP, GIF, BMP and TIFF. Raises ``ImageError`` for anything else, for a damaged or truncated file,
    and for more than ``max_pixels`` pixels, which is known before any memory is spent on them.
    """
    _check_pixels(_webp_size(data), min(max_pixels, _MOST_WEBP_PIXELS))
    try:
        image = _open(data)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("the image has too many pixels") from None
    except Exception:  # PIL's decoders raise almost anything on damaged input
        raise ImageError(_NOT_DECODED) from None
    with image:
        _check_pixels(image.size, min(max_pixels, _most_pixels(image)))
        try:
            image.load()
            # Asked for after loading: PIL turns TIFF images by itself then, and forgets their orientation.
            orientation = _orientation(image)
            rgb = _convert(image)
            return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
        except Exception:
            raise ImageError(_NOT_DECODED) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any PIL mode to RGB: transparency on white, 16-bit grey scaled rather than clipped."""
    try:
        return _convert(image)
    except Exception:
        raise ImageError(f"an image of mode {image.mode} could not be converted to RGB") from None


def _open(data: bytes) -> ImageFile:
    """Read the header with the one plugin that the first bytes call for.

    ``Image.open(formats=...)`` would do the same but warns or fails by a process-wide pixel limit of its own, and
    hands JPEG files that hold several frames to yet another plugin.
    """
    if is_too_intricate(data):
        raise ImageError("the image file consists of too many parts")
    stream = io.BytesIO(data)
    if data.startswith(b"\xff\xd8\xff"):
        if num_scans(data, _MOST_SCANS) > _MOST_SCANS:
            raise ImageError("the image has too many scans")
        return JpegImageFile(stream)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(stream)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile(stream)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile(stream)
    if data.startswith(b"BM"):
        return BmpImageFile(stream)
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return TiffImageFile(stream)
    raise ImageError("the image is not JPEG, PNG, WebP, GIF, BMP or TIFF")


def _most_pixels(image: ImageFile) -> int:
    """What the format itself allows."""
    if any(tile.codec_name == "bmp_rle" for tile in image.tile):
        return _MOST_RUN_LENGTH_PIXELS
    return _MOST_WEBP_PIXELS if image.format == "WEBP" else sys.maxsize


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size of an extended WebP file, whose decoder allocates the whole canvas as it reads the header."""
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X" or len(data) < 30:
        return 0, 0
    return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(f"the image is {width}x{height} pixels, the limit is {max_pixels} pixels")
    if max(width, height) > _LONGEST_SIDE:
        raise ImageError(f"the image is {width}x{height} pixels, the limit of a side is {_LONGEST_SIDE} pixels")


def _orientation(image: Image.Image) -> int:
    if len(image.info.get("exif", b"")) > MOST_EXIF_BYTES:
        return 1  # its numbers would become objects one by one
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # broken metadata does not make the picture unusable
        return 1
    return value if isinstance(value, int) else 1


def _convert(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_rgb(image)
    if image.has_transparency_data:
        return _flatten(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _flatten(image: Image.Image) -> Image.Image:
    """Lay the image on white."""
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:
        # A 16-bit PNG names its transparent colour in 16 bits; PIL has kept the high byte of each pixel.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode in ("RGBa", "La"):  # premultiplied; PIL only knows the way back to the same bands
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """Scale greys of more than 8 bits to 8; PIL's own conversion clips them to white."""
    transparent = image.info.get("transparency")
    has_16_bits = image.mode.startswith("I;16")
    white = 0.0 if has_16_bits else _full_scale(image)
    greys = Image.new("L", image.size)
    for top, values in _bands(image):
        if has_16_bits:
            scaled: npt.NDArray[Any] = (values.astype(np.uint32) + 128) // 257
        else:
            scaled = np.rint(_positive(values).astype(np.float64) * (255 / white))
        if isinstance(transparent, int):
            scaled = np.where(values == transparent, 255, scaled)
        greys.paste(Image.fromarray(scaled.clip(0, 255).astype(np.uint8)), (0, top))
    return greys.convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The pixels in bands of rows, each with the number of its first row."""
    rows = max(1, _BAND_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def _positive(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    finite: npt.NDArray[Any] = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return finite.clip(0)


def _full_scale(image: Image.Image) -> float:
    """The white level of greys that do not carry one: the smallest usual level that holds the brightest pixel."""
    brightest = max((float(_positive(values).max(initial=0)) for _, values in _bands(image)), default=0.0)
    levels = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0, float(2**31 - 1))
    return next((level for level in levels if brightest <= level), brightest)
