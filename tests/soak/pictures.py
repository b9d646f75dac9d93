"""Picture files of every kind that clients send, all of them seeded."""

import base64
import io
import random
import struct
import zlib

from PIL import Image

from demo.scenes import make_example

_FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "RGB"),
    "TIFF": ("L", "RGB", "CMYK"),
}
_KINDS = [(kind, mode) for kind, modes in _FORMATS.items() for mode in modes]
_SIZES = [(1, 1), (31, 500), (600, 40), (288, 288), (640, 480), (900, 1200)]


def picture(number: int) -> bytes:
    """A drawn scene as a file whose format, mode and size the number says."""
    kind, mode = _KINDS[number % len(_KINDS)]
    drawn = make_example(4_000_007, number, num_turns=0).image
    size = _SIZES[number % len(_SIZES)] if number % 3 == 2 else drawn.size
    image = drawn.resize(size)
    image = image.convert("L").convert("I").point(lambda level: level * 257).convert(mode) if mode == "I;16" else (
        image.convert(mode)
    )  # fmt: skip
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def renamed(png: bytes, chance: random.Random) -> bytes:
    """A PNG file of the same pixels that is like no other: it holds a comment."""
    comment = b"Comment\x00" + str(chance.getrandbits(64)).encode()
    chunk = struct.pack(">I", len(comment)) + b"tEXt" + comment + struct.pack(">I", zlib.crc32(b"tEXt" + comment))
    end = png.rindex(b"IEND") - 4
    return png[:end] + chunk + png[end:]


def noise(chance: random.Random) -> bytes:
    """A small picture that never came before."""
    file = io.BytesIO()
    Image.frombytes("RGB", (16, 16), chance.randbytes(16 * 16 * 3)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    """A file as clients send it. The kind that it names is nobody's business."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
