"""Files that would keep PIL busy for minutes or take gigabytes, and whole ones of many parts that must be served."""

import contextlib
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.image_decode import ImageError, decode_image
from tests.image_files import bmp_of, encoded, png_chunk, png_of, shorts, tiff_of

MANY = 200_000
PICTURE = Image.new("RGB", (16, 16), (9, 99, 199))
LIMIT = 64_000_000


def jpeg_with(*segments: bytes) -> bytes:
    whole = encoded(PICTURE, "JPEG")
    return whole[:2] + b"".join(segments) + whole[2:]


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def png_with(*chunks: bytes, at: int = 33) -> bytes:
    whole = encoded(PICTURE, "PNG")
    return whole[:at] + b"".join(chunks) + whole[at:]


def gif_with(extensions: bytes) -> bytes:
    whole = encoded(PICTURE, "GIF")
    place = 13 + (3 << (whole[10] & 7) + 1)
    return whole[:place] + extensions + whole[place:]


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def tiff_with(*entries: tuple[int, int, int, bytes], height: int = 1) -> bytes:
    usual = [(256, 1), (257, height), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1)]
    return tiff_of([*((tag, 4, 1, numbers(value)) for tag, value in usual), *entries])


def webp_with_exif(exif: bytes) -> bytes:
    whole = encoded(PICTURE, "WEBP")
    described = b"VP8X" + numbers(10) + bytes([8, 0, 0, 0, 15, 0, 0, 15, 0, 0])
    chunks = described + whole[12:] + b"EXIF" + numbers(len(exif)) + exif
    return b"RIFF" + numbers(len(chunks) + 4) + b"WEBP" + chunks


TOO_INTRICATE = {
    "comments": jpeg_with(b"\xff\xfe\0\2" * MANY),
    "exif in small parts": jpeg_with(segment(0xE1, b"Exif\0\0" + b"x" * 10) * MANY),
    "exif in large parts": jpeg_with(segment(0xE1, b"Exif\0\0" + b"x" * 60_000) * 20),
    "fill bytes": jpeg_with(b"\xff" * MANY),
    "junk": jpeg_with(b"\xff\0" + b"x" * MANY),
    "restarts": jpeg_with(b"\xff\xd0" * MANY),
    "reserved markers": jpeg_with(b"\xff\xf3" * MANY),
    "frames": jpeg_with(segment(0xC0, b"\x08\0\x10\0\x10\x03" + b"\1\x11\0" * 20_000) * 3),
    "tables": jpeg_with(segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 3),
    "chunks before the pixels": png_with(png_chunk(b"prIv", b"") * MANY),
    "chunks behind the pixels": png_with(png_chunk(b"prIv", b"") * MANY, at=-12),
    "pixels in empty chunks": png_with(png_chunk(b"IDAT", b"") * MANY),
    "blocks of a comment": gif_with(b"!\xfe" + b"\1a" * MANY + b"\0"),
    "extensions": gif_with(b"!\xfe\0" * MANY),
    "junk between extensions": gif_with(b"\0" * MANY),
    "blocks behind an empty one": gif_with(b"!\xf9\0" + b"\1," * MANY + b"\0"),
    "strips": tiff_with((273, 4, MANY, numbers(8) * MANY), height=MANY),
    "fractions": tiff_with((273, 4, 1, numbers(8)), (282, 5, MANY, numbers(1, 3) * MANY)),
    "signed bytes": tiff_with((273, 4, 1, numbers(8)), (258, 6, MANY, b"\1" * MANY)),
    "entries": b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, MANY) + struct.pack("<HHQQ", 256, 4, 1, 1) * MANY,
}


def tiled(width: int, height: int, *more: tuple[int, int, int, bytes], tile: tuple[int, int], count: int = 1) -> bytes:
    """A TIFF of grey tiles, each of which is the same compressed black one."""
    packed = zlib.compress(bytes(min(1 << 20, tile[0] * tile[1])))
    entries = [
        (256, 4, 1, numbers(width)), (257, 4, 1, numbers(height)), (258, 3, 1, shorts(8)), (259, 3, 1, shorts(8)),
        (262, 3, 1, shorts(1)), (277, 3, 1, shorts(1)), (322, 4, 1, numbers(tile[0])), (323, 4, 1, numbers(tile[1])),
        (324, 4, count, numbers(16) * count), (325, 4, count, numbers(len(packed)) * count), *more,
    ]  # fmt: skip
    return tiff_of(entries, packed)


TOO_INTRICATE |= {
    "one large tile": tiled(16, 16, tile=(26_752, 26_736)),
    "long tiles": tiled(1600, 1, tile=(16, 800_000), count=100),
    "wide tiles": tiled(1, 1600, tile=(800_000, 16), count=100),
    "tiles of two sizes": tiled(64, 64, (322, 4, 1, numbers(1 << 20)), tile=(64, 64)),
    "a tile without a height": tiled(64, 64, tile=(1 << 20, 0)),
    "sizes in a list": tiled(64, 64, (322, 4, 2, numbers(64, 1 << 20)), tile=(64, 64)),
}


@pytest.mark.parametrize("size", [(100, 50), (256, 256), (600, 300)])
def test_tiles_that_reach_beyond_a_picture_are_served(size: tuple[int, int]) -> None:
    across, down = -(-size[0] // 256), -(-size[1] // 256)
    image = decode_image(tiled(*size, tile=(256, 256), count=across * down), max_pixels=LIMIT)
    assert image.size == size and image.getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("data", TOO_INTRICATE.values(), ids=TOO_INTRICATE)
def test_too_many_parts(data: bytes) -> None:
    started = time.process_time()
    with pytest.raises(ImageError, match="too many parts"):
        decode_image(data, max_pixels=LIMIT)
    assert time.process_time() - started < 0.5


SERVED = {
    "a profile and 1 MB of metadata": jpeg_with(
        *(segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 255]) + b"p" * 99) for i in range(1, 256)),
        *[segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"x" * 60_000)] * 20,
    ),
    "pixels in small chunks": png_of(
        (64, 64, 8, 2, 0), (b"\0" + b"\x80" * 192) * 64, *[png_chunk(b"tEXt", b"a\0b")] * 5000
    ),
    "a long comment": gif_with(b"!\xfe" + (b"\xff" + b"c" * 255) * 5000 + b"\0"),
    "row by row": encoded(Image.new("L", (4, 20_000), 7), "TIFF", strip_size=4, compression="tiff_lzw"),
    "a long description": encoded(PICTURE, "TIFF", tiffinfo={270: "d" * 300_000}),
    "exif whose numbers are too many": webp_with_exif(tiff_of([(0x0112, 5, MANY, numbers(6, 1) * MANY)])),
}


@pytest.mark.parametrize("data", SERVED.values(), ids=SERVED)
def test_files_of_many_parts(data: bytes) -> None:
    started = time.process_time()
    assert decode_image(data, max_pixels=LIMIT).mode == "RGB"
    assert time.process_time() - started < 2


def test_scans_are_counted_up_to_the_end_of_the_image() -> None:
    """Behind which cameras put a video, where their marker comes by chance."""
    whole = encoded(PICTURE, "JPEG", progressive=True)
    video = np.random.default_rng(1).bytes(100_000) + b"\xff\xda" * 500
    assert decode_image(whole + video, max_pixels=LIMIT).size == PICTURE.size
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    for between in (b"", b"\xff\xd0", segment(0xFE, b"\xff\xd9"), segment(0xFE, b"x") * 500, b"\xff" * 9):
        bomb = whole[:-2] + (between + scan) * 100 + b"\xff\xd9"
        with pytest.raises(ImageError, match="too many scans"):
            decode_image(bomb, max_pixels=LIMIT)
    with pytest.raises(ImageError, match="too many scans"):
        decode_image(whole[:-2] + segment(0xFE, b"") * MANY + b"\xff\xd9", max_pixels=LIMIT)


@pytest.mark.parametrize("size", [(2049, 2048), (1_000_000, 9)])
@pytest.mark.parametrize("compression", [1, 2])
def test_run_lengths_are_limited(size: tuple[int, int], compression: int) -> None:
    bits = {1: 8, 2: 4}[compression]
    with pytest.raises(ImageError, match="the limit is 4194304 pixels"):
        decode_image(bmp_of(*size, bits, compression, b"\1\1\0\0" * 100), max_pixels=LIMIT)
    assert decode_image(bmp_of(2048, 2048, 8, 1, b"\xff\1" * 8 + b"\1\1\0\0" * 2048), max_pixels=LIMIT).size


def test_sides_are_limited() -> None:
    with pytest.raises(ImageError, match="1x2000000 pixels, the limit of a side is 1048576 pixels"):
        decode_image(png_of((1, 2_000_000, 8, 0, 0), b"\0\0" * 2_000_000), max_pixels=LIMIT)


def memory_mib() -> int:
    """The most that this process has had since `forget_memory`."""
    status = Path("/proc/self/status").read_text()
    return int(status[status.index("VmHWM:") + 6 :].split()[0]) >> 10


def forget_memory() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mib()


def scans_of(image: Image.Image) -> bytes:
    """As many as may be, each over the whole picture, of the kind that takes longest."""
    whole = encoded(image, "JPEG", progressive=True)
    parts = [match.start() for match in re.finditer(b"\xff\xda", whole)]
    return whole[:-2] + whole[parts[5] : parts[6]] * (64 - len(parts)) + whole[-2:]


LARGEST: dict[str, tuple[str, Callable[[Image.Image], bytes]]] = {
    "PNG": ("RGBA", lambda image: encoded(image, "PNG", compress_level=1)),
    "PNG with a palette": ("P", lambda image: encoded(image, "PNG", transparency=0)),
    "JPEG of many scans": ("RGB", scans_of),
    "JPEG for print": ("CMYK", lambda image: encoded(image, "JPEG")),
    "WebP": ("RGBA", lambda image: encoded(image, "WEBP", lossless=True, method=0)),
    "GIF": ("L", lambda image: encoded(image, "GIF")),
    "TIFF": ("RGBA", lambda image: encoded(image, "TIFF", compression="tiff_lzw")),
    "BMP": ("RGB", lambda image: encoded(image, "BMP")),
}


@pytest.mark.parametrize(("mode", "encode"), LARGEST.values(), ids=LARGEST)
def test_a_pixel_takes_little_time_and_memory(mode: str, encode: Callable[[Image.Image], bytes]) -> None:
    """0.25 µs of a processor and 24 bytes: with the limit on pixels that bounds what one picture can take."""
    data = encode(Image.new(mode, (4000, 4000)))
    before, started = forget_memory(), time.thread_time()
    decode_image(data, max_pixels=LIMIT)
    assert time.thread_time() - started < 4
    assert memory_mib() - before < 24 * 16


@pytest.mark.parametrize(("mode", "brightest"), [("F", 1.0), ("I", 65535), ("I;16", 65535)])
def test_greys_need_little_memory(mode: str, brightest: float) -> None:
    """Of 16 million pixels: 64 MB each as they are and as RGB, and nothing of that size in between."""
    values = np.zeros((4000, 4000), {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode])
    values[3999, 3999] = brightest
    file = encoded(Image.fromarray(values), "TIFF", compression="tiff_adobe_deflate")
    before = forget_memory()
    decoded = decode_image(file, max_pixels=LIMIT)
    assert memory_mib() - before < 300
    assert decoded.getpixel((3999, 3999)) == (255, 255, 255)
    assert decoded.getextrema() == ((0, 255),) * 3


def test_damaged_rows_fill_no_log(capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(1).integers(0, 2, (500, 64), np.uint8) > 0
    data = bytearray(encoded(Image.fromarray(noise), "TIFF", compression="tiff_ccitt"))
    for place in range(300, len(data) - 300, 11):
        data[place] ^= 0x55
    decode_image(bytes(data), max_pixels=LIMIT)
    assert capfd.readouterr() == ("", "")


def test_compressed_metadata_of_a_png_is_bounded() -> None:
    bomb = zlib.compress(bytes(30 << 20), 9)
    for chunk in (png_chunk(b"iCCP", b"p\0\0" + bomb), png_chunk(b"zTXt", b"t\0\0" + bomb) * 100):
        before = forget_memory()
        with contextlib.suppress(ImageError):
            decode_image(png_with(chunk), max_pixels=LIMIT)
        assert memory_mib() - before < 100
