"""How many pieces an image file consists of, counted before PIL goes through them one by one.

It does so in Python, some of it in quadratic time: a file of a few megabytes that is nothing but empty pieces would
keep it busy for minutes. What stands here walks as PIL walks, lest a file show the two of them different pieces.
"""

import re
from collections.abc import Callable
from typing import Literal

from PIL.JpegImagePlugin import MARKER

_MOST_SEGMENTS = 1 << 10
"""Of a JPEG before its first scan. A colour profile has 255 at most, other metadata one for each 64 KiB."""
_MOST_TABLE_BYTES = 1 << 16
"""Of what describes a JPEG's pixels. A file has about one kilobyte."""
MOST_EXIF_BYTES = 1 << 20
_MOST_PIECES = 1 << 16
"""Of any other file: PNG's chunks, GIF's blocks before the first picture, numbers of one entry of a TIFF."""
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""Such as begin a segment, or end the image; what has no length is left out."""
_TIFF_TILES = {256: "width", 257: "height", 322: "tile_width", 323: "tile_height"}
"""Numbers of entries."""
_SPARE_PIXELS = 1 << 20
"""By which tiles may reach beyond a small picture; decoders decode them whole."""
_TIFF_BYTES = (1, 2, 7)
"""Types of entries that PIL keeps as they are, rather than number for number."""


def is_too_intricate(data: bytes) -> bool:
    """Whether reading a file's structure would take longer than any picture deserves; False for unknown formats."""
    return any(data.startswith(magic) and check(data) for magic, check in _CHECKS)


def num_scans(data: bytes, most: int) -> int:
    """How often a JPEG's decoder goes over the picture; a number above `most` where that is more, or hard to tell.

    Counted up to the image's end: videos that cameras put behind it hold any bytes, and these among them.
    """
    at, scans = 2, 0
    for _ in range(_MOST_PIECES):
        found = _JPEG_MARKER.search(data, at)
        if found is None or found[0] == b"\xff\xd9":
            return scans
        scans += found[0] == b"\xff\xda"
        if scans > most:
            break
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    return most + 1


def _jpeg(data: bytes) -> bool:
    at, steps, tables, exif = 2, 0, 0, 0
    while steps <= _MOST_SEGMENTS and tables <= _MOST_TABLE_BYTES and exif <= MOST_EXIF_BYTES:
        start = data.find(b"\xff", at)
        if start < 0 or start + 1 >= len(data):
            return False
        steps += 1 + start - at  # junk is skipped byte by byte
        marker = data[start + 1]
        if marker == 0xDA:
            return False
        _, _, handler = MARKER.get(0xFF00 | marker, ("", "", None))
        if handler is None:
            at = start + (1 if marker == 0xFF else 2)
            continue
        length = max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            tables += length
        if marker == 0xE1 and data.startswith(b"Exif\0\0", start + 4):
            exif += length
        at = start + 2 + length
    return True


def _png(data: bytes) -> bool:
    at = 8
    for _ in range(_MOST_PIECES):
        if at >= len(data):
            return False
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return True


def _gif(data: bytes) -> bool:
    flags = data[10] if len(data) > 10 else 0
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    steps = 0
    while at < len(data) and data[at] not in b",;":
        if data[at : at + 1] == b"!":
            # PIL reads one more row of blocks behind an empty one, unless it is a comment.
            rows = 2 if data[at + 1 : at + 2] != b"\xfe" and data[at + 2 : at + 3] == b"\0" else 1
            at += 2
            for _ in range(rows):
                while at < len(data) and data[at] and steps <= _MOST_PIECES:
                    at, steps = at + 1 + data[at], steps + 1
                at += 1
        else:
            at += 1
        steps += 1
        if steps > _MOST_PIECES:
            return True
    return False


def _tiff(data: bytes) -> bool:
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
    is_big = data[2:3] == b"+"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    at = number(8, 8) if is_big else number(4, 4)
    count, at = (number(at, 8), at + 8) if is_big else (number(at, 2), at + 2)
    width, size = (20, 8) if is_big else (12, 4)
    if count * width > len(data):
        count = max(0, len(data) - at) // width
    entries = range(at, at + count * width, width)
    if count > _MOST_PIECES or any(
        number(entry + 4, size) > _MOST_PIECES and number(entry + 2, 2) not in _TIFF_BYTES for entry in entries
    ):
        return True
    sizes: dict[str, int] = {}
    for entry in entries:
        name = _TIFF_TILES.get(number(entry, 2))
        if name is None:
            continue
        bytes_each = {3: 2, 4: 4, 16: 8}.get(number(entry + 2, 2))
        if name in sizes or bytes_each is None or number(entry + 4, size) != 1:
            return True  # two decoders might take it for two sizes
        sizes[name] = number(entry + 4 + size, bytes_each)
    return _has_large_tiles(**sizes)


def _has_large_tiles(width: int = 0, height: int = 0, tile_width: int = 0, tile_height: int = 0) -> bool:
    """Whether a TIFF's tiles, which all are decoded whole, hold far more than its picture."""
    if not tile_width and not tile_height:
        return False
    if not (tile_width and tile_height):
        return True
    across, down = -(-width // tile_width), -(-height // tile_height)
    return across * down * tile_width * tile_height > 2 * width * height + _SPARE_PIXELS


_CHECKS: tuple[tuple[bytes, Callable[[bytes], bool]], ...] = (
    (b"\xff\xd8\xff", _jpeg),
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"GIF8", _gif),
    (b"II", _tiff),
    (b"MM", _tiff),
)
