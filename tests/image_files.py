"""Image files of many kinds: what PIL writes, and by hand what it does not write."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 37, 23


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def all_files() -> dict[str, bytes]:
    """Small whole files by name, which begins with their format's; the same ones each time."""
    ys, xs = np.mgrid[0:HEIGHT, 0:WIDTH]
    ramp = np.stack((xs * 255 // WIDTH, ys * 255 // HEIGHT, (xs * 7 + ys * 13) % 256, 255 - xs * 3), -1)
    rgba = Image.fromarray(ramp.astype(np.uint8))
    pictures = {mode: rgba.convert("RGB").convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB")}
    pictures |= {"RGBA": rgba, "LA": rgba.convert("LA"), "I;16": Image.fromarray((ramp[:, :, 0] * 257).astype("<u2"))}
    pictures |= {"I": Image.fromarray(ramp[:, :, 1].astype(np.int32)), "F": Image.fromarray(xs.astype(np.float32))}
    return _jpeg(pictures) | _png(pictures) | _gif(pictures) | _bmp(pictures) | _tiff(pictures) | _webp(pictures)


def _exif(orientation: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    return exif


def _jpeg(pictures: dict[str, Image.Image]) -> dict[str, bytes]:
    rgb = pictures["RGB"]
    options: dict[str, dict[str, Any]] = {
        "plain": {}, "progressive": {"progressive": True}, "optimized": {"optimize": True, "quality": 100},
        "whole colours": {"subsampling": 0}, "few colours": {"subsampling": 2, "quality": 5},
        "restarts": {"restart_marker_blocks": 1}, "profile": {"icc_profile": b"p" * 70000, "comment": b"c"},
    }  # fmt: skip
    files = {name: encoded(rgb, "JPEG", **given) for name, given in options.items()}
    files |= {mode: encoded(pictures[mode], "JPEG") for mode in ("L", "CMYK", "YCbCr")}
    files |= {f"upright {value}": encoded(rgb, "JPEG", exif=_exif(value)) for value in (*range(10), 65535)}
    files["frames"] = encoded(rgb, "MPO", save_all=True, append_images=[rgb])
    return {f"JPEG {name}": file for name, file in files.items()}


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(header: tuple[int, int, int, int, int], rows: bytes, *before: bytes) -> bytes:
    """A PNG of width, height, bits, colour type and interlacing, from its filtered rows; `before` are more chunks."""
    width, height, bits, colours, interlaced = header
    described = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced)
    chunks = [png_chunk(b"IHDR", described), *before, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _interlaced_rows(width: int, height: int, pixel_bytes: int) -> bytes:
    """Adam7's seven passes of one colour."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    sizes = ((-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in passes)
    return b"".join((b"\0" + b"\x80" * (columns * pixel_bytes)) * rows for columns, rows in sizes if columns > 0)


def _png(pictures: dict[str, Image.Image]) -> dict[str, bytes]:
    modes = ("1", "L", "P", "RGB", "RGBA", "LA", "I;16")
    files = {mode: encoded(pictures[mode], "PNG") for mode in modes}
    few = pictures["RGB"].quantize(4)
    files |= {f"{bits} bits": encoded(few, "PNG", bits=bits) for bits in (2, 4)}
    files["transparent colour"] = encoded(pictures["RGB"], "PNG", transparency=(0, 0, 0))
    files["transparent grey"] = encoded(pictures["L"], "PNG", transparency=7)
    files["transparent index"] = encoded(few, "PNG", transparency=bytes([0, 128, 255, 7]))
    files["transparent 16 bits"] = encoded(pictures["I;16"], "PNG", transparency=257)
    files["upright 6"] = encoded(pictures["RGB"], "PNG", exif=_exif(6))
    files["frames"] = encoded(pictures["RGB"], "PNG", save_all=True, append_images=[few.convert("RGB")], duration=9)
    for name, colours, samples in (("grey", 0, 1), ("RGB", 2, 3), ("RGBA", 6, 4), ("LA", 4, 2)):
        rows = (b"\1" + b"\x12\x34" * (samples * WIDTH)) * HEIGHT
        transparent = [png_chunk(b"tRNS", b"\x12\x34" * samples)] if samples % 2 else []
        files[f"16 bits {name}"] = png_of((WIDTH, HEIGHT, 16, colours, 0), rows, *transparent)
        rows = _interlaced_rows(WIDTH, HEIGHT, samples)
        files[f"interlaced {name}"] = png_of((WIDTH, HEIGHT, 8, colours, 1), rows)
    return {f"PNG {name}": file for name, file in files.items()}


def _gif(pictures: dict[str, Image.Image]) -> dict[str, bytes]:
    palette, rgb = pictures["P"], pictures["RGB"]
    files = {mode: encoded(pictures[mode], "GIF") for mode in ("1", "L", "P", "RGB", "RGBA")}
    files["rows in order"] = encoded(palette, "GIF", interlace=False, comment=b"c" * 300)
    others = [rgb.rotate(turn) for turn in (90, 180)]
    for disposal in range(4):
        files[f"frames {disposal}"] = encoded(
            rgb, "GIF", save_all=True, append_images=others, disposal=disposal, duration=5, transparency=0
        )
    frame = struct.pack("<HHHHB", 60, 50, 1, 1, 0) + b"\2\2\x44\1\0"
    files["picture beyond its screen"] = (
        b"GIF87a" + struct.pack("<HHBBB", 40, 30, 0x80, 0, 0) + b"abcdef" + b"," + frame + b";"
    )
    return {f"GIF {name}": file for name, file in files.items()}


def bmp_of(width: int, height: int, bits: int, compression: int, data: bytes, *, between: bytes = b"") -> bytes:
    """A BMP with the usual header; `between` are palette or masks, made up where needed."""
    between = between or b"\0\1\2\0" * (1 << bits if bits <= 8 else 0)
    start = 54 + len(between)
    colours = 1 << bits if bits <= 8 else 0
    described = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + described + between + data


def _bmp(pictures: dict[str, Image.Image]) -> dict[str, bytes]:
    files = {mode: encoded(pictures[mode], "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")}
    files["from above"] = bmp_of(8, -4, 24, 0, bytes(range(96)))
    files["16 bits"] = bmp_of(8, 4, 16, 0, bytes(range(64)))
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    files["16 bits with masks"] = bmp_of(8, 4, 16, 3, bytes(range(64)), between=masks)
    files["32 bits"] = bmp_of(8, 4, 32, 0, bytes(range(128)))
    files["runs 8"] = bmp_of(9, 4, 8, 1, b"\5\1\4\2\0\0\0\5abcde\0\0\2\2\1\7\1\0\0\0\2\1\1\1\1\0\1")
    files["runs 4"] = bmp_of(9, 4, 4, 2, b"\5\x12\4\x34\0\0\0\5\x12\x34\x50\0\0\2\2\2\2\x21\0\0\0\1")
    files["old header"] = b"BM" + struct.pack("<IHHIIHHHH", 122, 0, 0, 26, 12, 8, 4, 1, 24) + bytes(range(96))
    return {f"BMP {name}": file for name, file in files.items()}


def tiff_of(
    entries: list[tuple[int, int, int, bytes]], data: bytes = b"", order: str = "<", big: bool = False
) -> bytes:
    """A TIFF of one directory of (tag, type, count, value); `data` begin at byte 16."""
    magic = {"<": b"II", ">": b"MM"}[order]
    field, width = ("Q", 8) if big else ("I", 4)
    start = 16 + len(data)
    head = magic + struct.pack(order + "HHHQ", 43, 8, 0, start) if big else magic + struct.pack(order + "HI", 42, start)
    apart = start + struct.calcsize(order + ("Q" if big else "H") + field) + len(entries) * (4 + 2 * width)
    directory, rest = [struct.pack(order + ("Q" if big else "H"), len(entries))], b""
    for tag, kind, count, value in entries:
        held = value.ljust(width, b"\0")
        if len(value) > width:
            held, rest = struct.pack(order + field, apart + len(rest)), rest + value
        directory.append(struct.pack(order + "HH" + field, tag, kind, count) + held)
    return head.ljust(16, b"\0") + data + b"".join(directory) + bytes(width) + rest


def shorts(*values: int, order: str = "<") -> bytes:
    """Numbers of 16 bits."""
    return struct.pack(f"{order}{len(values)}H", *values)


def _tiff(pictures: dict[str, Image.Image]) -> dict[str, bytes]:
    files = {mode: encoded(image, "TIFF") for mode, image in pictures.items() if mode != "P"}
    files |= {name: encoded(pictures["RGB"], "TIFF", compression=f"tiff_{name}") for name in ("lzw", "adobe_deflate")}
    files |= {name: encoded(pictures["RGB"], "TIFF", compression=name) for name in ("packbits", "jpeg")}
    files |= {name: encoded(pictures["1"], "TIFF", compression=name) for name in ("group3", "group4", "tiff_ccitt")}
    files["predicted"] = encoded(pictures["RGB"], "TIFF", compression="tiff_lzw", tiffinfo={317: 2})
    files["palette"] = encoded(pictures["P"], "TIFF")
    files["several strips"] = encoded(pictures["RGB"], "TIFF", compression="tiff_lzw", strip_size=WIDTH * 3 * 2)
    files["big"] = encoded(pictures["RGB"], "TIFF", big_tiff=True)
    files["frames"] = encoded(pictures["L"], "TIFF", save_all=True, append_images=[pictures["RGB"]])
    files |= {f"upright {value}": encoded(pictures["L"], "TIFF", exif=_exif(value)) for value in (3, 5, 8)}
    for order in "<>":
        for big in (False, True):
            files[f"tiles {order} {big}"] = _tiled(order, big)
    return {f"TIFF {name}": file for name, file in files.items()}


def _tiled(order: str, big: bool) -> bytes:
    """Grey, 40 x 20 in tiles of 16 x 16."""

    def one(tag: int, *values: int) -> tuple[int, int, int, bytes]:
        return tag, 3, len(values), shorts(*values, order=order)

    tile = bytes(range(256))
    offsets = struct.pack(order + "6I", *(16 + 256 * i for i in range(6)))
    sizes = struct.pack(order + "6I", *[256] * 6)
    entries = [
        one(256, 40), one(257, 20), one(258, 8), one(259, 1), one(262, 1), one(277, 1), one(322, 16), one(323, 16),
        (324, 4, 6, offsets), (325, 4, 6, sizes),
    ]  # fmt: skip
    return tiff_of(entries, tile * 6, order, big)


def _webp(pictures: dict[str, Image.Image]) -> dict[str, bytes]:
    rgb, rgba = pictures["RGB"], pictures["RGBA"]
    files = {"lossy": encoded(rgb, "WEBP"), "lossless": encoded(rgb, "WEBP", lossless=True)}
    files |= {"alpha": encoded(rgba, "WEBP", quality=30), "lossless alpha": encoded(rgba, "WEBP", lossless=True)}
    files["frames"] = encoded(rgb, "WEBP", save_all=True, append_images=[rgba, rgb.rotate(90)], duration=7)
    files["upright 7"] = encoded(rgb, "WEBP", exif=_exif(7), icc_profile=b"profile", xmp=b"<x/>")
    return {f"WEBP {name}": file for name, file in files.items()}
