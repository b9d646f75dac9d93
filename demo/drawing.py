"""Draws scenes with Pillow, and tells where in the picture each thing is."""

import math
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from demo import palette
from demo.palette import RGB
from demo.world import CHARACTERS, COLOURS, KINDS, Bar, Scene, Shape, Word

_FONT_FILES = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf", "DejaVuSans-Oblique.ttf", "STIXGeneral.ttf", "STIXGeneralBol.ttf",
)  # fmt: skip
NUM_FONTS = len(_FONT_FILES)
BAR_CLASS = 1 + len(KINDS) + len(CHARACTERS)
NUM_CLASSES = BAR_CLASS + 1
"""Of `Labels.what`: nothing, the kinds of shapes, the characters, a bar."""
_FARTHEST = 1.3
"""Point of any shape from its centre, in units of its radius."""

_Mask = Image.Image
_Point = tuple[float, float]


class Labels:
    """What each pixel shows: the number of a thing, whose class and colour are looked up. Training looks at them."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.canvas = Image.new("L", size)
        self._what, self._colour = [0], [0]

    def add(self, mask: _Mask, corner: tuple[int, int], what: int, colour: str) -> None:
        """Something is drawn over what was there."""
        self.canvas.paste(len(self._what), corner, mask.point(lambda level: 255 * (level > 127)))
        self._what.append(what)
        self._colour.append(1 + COLOURS.index(colour))

    def at(self, rows: npt.NDArray[Any], columns: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """(2, …) class and colour (0: none) at pixels; 0 outside the picture."""
        numbers = np.asarray(self.canvas)
        inside = (rows >= 0) & (columns >= 0) & (rows < numbers.shape[0]) & (columns < numbers.shape[1])
        found = np.where(inside, numbers[rows.clip(0, numbers.shape[0] - 1), columns.clip(0, numbers.shape[1] - 1)], 0)
        return np.stack((np.array(self._what, np.uint8)[found], np.array(self._colour, np.uint8)[found]))


def draw_scene(scene: Scene, size: tuple[int, int], random: Random) -> tuple[Image.Image, Labels]:
    """A picture (RGB) of this width and height, before noise.

    The shades of all colours are drawn until each stands out from the background, a word's also from shapes below it.
    """
    labels = Labels(size)
    behind = palette.background(scene.background, random)
    image = _background(behind, size, random)
    shades = {}
    for shape in sorted(scene.shapes, key=lambda shape: -shape.radius):
        shades[shape] = _shade(shape.colour, [behind], random)
        _draw_shape(image, labels, shape, shades[shape])
    for word in scene.words:
        below = [shades[shape] for shape in scene.shapes if lies_below(shape, word, size)]
        _draw_word(image, labels, word, _shade(word.colour, [behind, *below], random))
    if scene.bars:
        _draw_chart(image, labels, scene.bars, behind, random)
    return image, labels


def lies_below(shape: Shape, word: Word, size: tuple[int, int]) -> bool:
    """Whether a word may be drawn over a part of a shape."""
    width, height = size
    turned = math.radians(abs(word.angle))
    half = 0.5 * (1.3 * word.height * height * math.cos(turned) + word.width * width * math.sin(turned))
    middle = min(max(word.y * height, half), height - half)  # since all letters are in the picture
    return abs(shape.y * height - middle) < half + _FARTHEST * shape.radius * math.sqrt(width * height)


def _shade(name: str, behind: list[RGB], random: Random) -> RGB:
    shades = [palette.colour(name, random) for _ in range(20)]
    return next((shade for shade in shades if all(palette.stands_out(shade, one) for one in behind)), shades[-1])


def _background(behind: RGB, size: tuple[int, int], random: Random) -> Image.Image:
    """Plain, or with a pattern of two shades that are close to each other."""
    image = Image.new("RGB", size, behind)
    style = random.choice(("plain", "plain", "gradient", "stripes", "dots", "blotches"))
    if style == "plain":
        return image
    other = Image.new("RGB", size, _neighbour(behind, random))
    if style == "gradient":
        mask = Image.linear_gradient("L").rotate(random.choice((0, 90, 180, 270))).resize(size)
    elif style == "blotches":
        generator = np.random.default_rng(random.getrandbits(32))
        cells = generator.integers(0, 256, (random.randint(3, 7), random.randint(3, 7)), np.uint8)
        mask = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
    else:
        mask = _pattern(style, size, random)
    return Image.composite(other, image, mask)


def _pattern(style: str, size: tuple[int, int], random: Random) -> _Mask:
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    step = max(6, int(random.uniform(0.03, 0.12) * max(size)))
    if style == "stripes":
        slope = random.choice((0, 0, size[1]))
        for x in range(-size[1], size[0] + size[1], step):
            draw.line((x, 0, x + slope, size[1]), fill=255, width=step // 2)
        return mask.transpose(Image.Transpose.ROTATE_90).resize(size) if random.random() < 0.4 else mask
    radius = step // 5 + 1
    for y in range(step // 2, size[1], step):
        for x in range(step // 2, size[0], step):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def _neighbour(shade: RGB, random: Random) -> RGB:
    change = random.choice((-1, 1)) * random.randint(8, 26)
    red, green, blue = (min(255, max(0, level + change)) for level in shade)
    return red, green, blue


def _draw_shape(image: Image.Image, labels: Labels, shape: Shape, shade: RGB) -> None:
    unit = math.sqrt(image.width * image.height)
    mask = _shape_mask(shape.kind, shape.radius * unit, shape.angle)
    corner = round(shape.x * image.width - mask.width / 2), round(shape.y * image.height - mask.height / 2)
    image.paste(shade, corner, mask)
    labels.add(mask, corner, 1 + KINDS.index(shape.kind), shape.colour)


def _shape_mask(kind: str, radius: float, angle: float) -> _Mask:
    """A filled shape with smooth edges."""
    scale = 2 if radius > 40 else 4
    half = math.ceil(radius * 1.3) + 1
    mask = Image.new("L", (2 * half * scale, 2 * half * scale))
    draw = ImageDraw.Draw(mask)
    turn = complex(math.cos(math.radians(angle)), math.sin(math.radians(angle)))

    def place(point: _Point) -> _Point:
        turned = complex(*point) * turn * radius * scale
        return half * scale + turned.real, half * scale + turned.imag

    def disc(centre: _Point, size: float, fill: int) -> None:
        x, y = place(centre)
        reach = size * radius * scale
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)

    if kind in ("circle", "ring", "moon"):
        disc((0, 0), 1, 255)
        if kind == "ring":
            disc((0, 0), 0.58, 0)
        if kind == "moon":
            disc((0.5, 0), 0.85, 0)
    else:
        draw.polygon([place(point) for point in _OUTLINES[kind]], fill=255)
    return mask.reduce(scale)


def _star() -> list[_Point]:
    points = []
    for i in range(10):
        reach, angle = (0.48 if i % 2 else 1.15), math.radians(36 * i - 90)
        points.append((reach * math.cos(angle), reach * math.sin(angle)))
    return points


def _heart() -> list[_Point]:
    points = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3 * 1.08, -(y + 2.5) / 14.5))
    return points


def _cross(width: float, reach: float) -> list[_Point]:
    w, r = width, reach
    return [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w), (w, r), (-w, r), (-w, w), (-r, w), (-r, -w), (-w, -w)]


_OUTLINES: dict[str, list[_Point]] = {
    "square": [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)],
    "rectangle": [(-1.15, -0.55), (1.15, -0.55), (1.15, 0.55), (-1.15, 0.55)],
    "triangle": [(0, -1.1), (1.05, 0.75), (-1.05, 0.75)],
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(0.34, 1.05),
}


@lru_cache(maxsize=1)
def _font_folder() -> Path:
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("drawing words takes matplotlib's fonts: pip install matplotlib")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=256)
def _font(number: int, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_folder() / _FONT_FILES[number], pixels)


def _fitting_font(text: str, number: int, width: float, height: float) -> ImageFont.FreeTypeFont:
    """The font at the size at which a text is no wider, and its letters no higher, than this many pixels."""
    trial = _font(number, 100)
    _, top, _, bottom = trial.getbbox("H")
    pixels = 100 * min(width / trial.getlength(text), height / (bottom - top))
    return _font(number, max(8, int(pixels)))


def _draw_word(image: Image.Image, labels: Labels, word: Word, shade: RGB) -> None:
    font = _fitting_font(word.text, word.font, word.width * image.width, word.height * image.height)
    centre = word.x * image.width, word.y * image.height
    _draw_text(image, labels, word.text, font, centre, (shade, word.colour), word.angle)


def _draw_text(
    image: Image.Image,
    labels: Labels,
    text: str,
    font: ImageFont.FreeTypeFont,
    centre: _Point,
    colour: tuple[RGB, str],
    angle: float = 0,
) -> None:
    # The ink, which in some letters reaches below the line or back before their beginning.
    left, top, right, bottom = font.getbbox(text)
    width, height = math.ceil(right - left) + 4, math.ceil(bottom - top) + 4
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=font)
    boxes = [(2 - left + font.getlength(text[:i]), 2 - left + font.getlength(text[: i + 1])) for i in range(len(text))]
    turned = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True) if angle else mask
    # Whatever place was wished for, all letters are in the picture.
    x, y = (
        max(0, min(round(wish - own / 2), whole - own))
        for wish, own, whole in zip(centre, turned.size, image.size, strict=True)
    )
    image.paste(colour[0], (x, y), turned)
    for character, (begin, end) in zip(text, boxes, strict=True):
        box = Image.new("L", (width, height))
        ImageDraw.Draw(box).rectangle((begin, 0, end, height), fill=255)
        turned = box.rotate(angle, Image.Resampling.NEAREST, expand=True) if angle else box
        labels.add(turned, (x, y), 1 + len(KINDS) + CHARACTERS.index(character), colour[1])


def _draw_chart(image: Image.Image, labels: Labels, bars: list[Bar], behind: RGB, random: Random) -> None:
    """Bars on a base line, each with its letter below."""
    ink_name = "white" if sum(behind) < 330 else "black"
    ink = palette.colour(ink_name, random)
    width, height = image.size
    left, right = width * random.uniform(0.06, 0.14), width * random.uniform(0.88, 0.96)
    letters = max(0.09 * height, 0.06 * max(image.size))
    top, base = height * random.uniform(0.06, 0.14), height - letters * random.uniform(1.7, 2)
    line = max(1, round(min(image.size) * random.uniform(0.004, 0.012)))
    draw = ImageDraw.Draw(image)
    if random.random() < 0.4:
        for i in range(1, 5):
            y = base - (base - top) * i / 4
            draw.line((left, y, right, y), fill=_neighbour(behind, random), width=line)
    pitch = (right - left) / len(bars)
    thickness = pitch * random.uniform(0.5, 0.78)
    font = _fitting_font("W", random.randrange(NUM_FONTS), pitch * 0.8, letters)
    for i, bar in enumerate(bars):
        middle = left + pitch * (i + 0.5)
        y = base - (base - top) * bar.height
        size = max(1, round(thickness)), max(1, round(base - y))
        corner = round(middle - thickness / 2), round(base) - size[1]
        mask = Image.new("L", size, 255)
        image.paste(_shade(bar.colour, [behind], random), corner, mask)
        labels.add(mask, corner, BAR_CLASS, bar.colour)
        _draw_text(image, labels, bar.label, font, (middle, (base + height) / 2), (ink, ink_name))
    draw.line((left, base, right, base), fill=ink, width=line)
    if random.random() < 0.6:
        draw.line((left, top, left, base), fill=ink, width=line)
