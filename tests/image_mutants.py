"""Damaged image files. The same seed makes the same ones."""

import random
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator

Span = tuple[int, int]
_EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_LARGEST = 200_000


def mutants(files: dict[str, bytes], numbers: Iterable[int], seed: int) -> Iterator[tuple[str, bytes]]:
    """Damaged files, one for each number, with names that say how they were made."""
    names = sorted(files)
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(names)
        data, steps = files[name], []
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            way = rng.choice(_WAYS)
            data = way(rng, data, files[rng.choice(names)])[:_LARGEST]
            steps.append(way.__name__.strip("_"))
        if data.startswith(b"\x89PNG") and rng.random() < 0.7:
            data = _with_checksums(data)
        yield f"{number}: {name}, {' '.join(steps)}", data


def _place(rng: random.Random, data: bytes) -> int:
    """Half of the time in the header, where most is decided."""
    return rng.randrange(max(1, min(len(data), 80 if rng.random() < 0.5 else len(data))))


def _flipped(rng: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 40)) if data else 0):
        changed[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwritten(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, count = _place(rng, data), rng.choice((1, 4, 30))
    return data[:at] + rng.choice((bytes(count), b"\xff" * count, rng.randbytes(count))) + data[at + count :]


def _with_extreme(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A number of 16 or 32 bits as large or as small as there are."""
    value, width, order = rng.choice(_EXTREMES), rng.choice("HI"), rng.choice("<>")
    packed = struct.pack(order + width, value & (0xFFFF if width == "H" else 0xFFFFFFFF))
    at = _place(rng, data)
    return data[:at] + packed + data[at + len(packed) :]


def _cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: _place(rng, data)]


def _without(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, end = rng.choice(_pieces(data, rng))
    return data[:start] + data[end:]


def _repeated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start, end = rng.choice(_pieces(data, rng))
    return data[:end] + data[start:end] * rng.choice((1, 3, 200)) + data[end:]


def _swapped(rng: random.Random, data: bytes, other: bytes) -> bytes:
    first, second = sorted(rng.choices(_pieces(data, rng), k=2))
    if first[1] > second[0]:
        return data
    moved = data[second[0] : second[1]] + data[first[1] : second[0]] + data[first[0] : first[1]]
    return data[: first[0]] + moved + data[second[1] :]


def _spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The beginning of one file and the rest of another."""
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def _with_piece_of(rng: random.Random, data: bytes, other: bytes) -> bytes:
    (at, _), (start, end) = rng.choice(_pieces(data, rng)), rng.choice(_pieces(other, rng))
    return data[:at] + other[start:end] + data[at:]


_WAYS: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    _flipped, _overwritten, _with_extreme, _with_extreme, _cut, _without, _repeated, _swapped, _spliced,
    _with_piece_of,
)  # fmt: skip


def _pieces(data: bytes, rng: random.Random) -> list[Span]:
    """Chunks or segments where the format has them, and some pieces that are none."""
    found: list[Span] = []
    if data.startswith(b"\x89PNG"):
        found = _walk(data, 8, lambda at: 12 + int.from_bytes(data[at : at + 4], "big"))
    elif data.startswith(b"RIFF"):
        found = _walk(data, 12, lambda at: 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2)
    elif data.startswith(b"\xff\xd8"):
        found = _walk(data, 2, lambda at: 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
    for _ in range(3):
        start = _place(rng, data)
        found.append((start, min(len(data), start + rng.choice((1, 12, 100)))))
    return found


def _walk(data: bytes, at: int, length: Callable[[int], int]) -> list[Span]:
    found: list[Span] = []
    while at < len(data) and len(found) < 40:
        found.append((at, at := min(len(data), at + length(at))))
    return found


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks say the right checksum, lest the damage be found by that alone."""
    parts, end = [data[:8]], 8
    for start, end in _walk(data, 8, lambda at: 12 + int.from_bytes(data[at : at + 4], "big")):
        chunk = data[start:end]
        parts.append(chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4])) if len(chunk) >= 12 else chunk)
    return b"".join(parts) + data[end:]
