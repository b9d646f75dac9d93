"""The colours that words stand for."""

import colorsys
from functools import cache
from random import Random

RGB = tuple[int, int, int]
Range = tuple[float, float]
Ranges = tuple[Range, Range, Range]

# Hue in degrees, saturation, value: what most people would give the name to without hesitation.
_COLOURS: dict[str, Ranges] = {
    "red": ((-8, 5), (0.78, 1), (0.68, 1)),
    "orange": ((24, 34), (0.85, 1), (0.92, 1)),
    "yellow": ((51, 60), (0.75, 1), (0.92, 1)),
    "green": ((100, 145), (0.6, 1), (0.42, 0.8)),
    "blue": ((210, 240), (0.68, 1), (0.62, 1)),
    "purple": ((268, 290), (0.55, 1), (0.45, 0.8)),
    "pink": ((322, 344), (0.32, 0.6), (0.94, 1)),
    "brown": ((20, 30), (0.6, 0.85), (0.34, 0.52)),
    "black": ((0, 360), (0, 0.3), (0, 0.1)),
    "white": ((0, 360), (0, 0.03), (0.95, 1)),
    "gray": ((0, 360), (0, 0.05), (0.42, 0.6)),
}
_BACKGROUNDS: dict[str, Ranges] = {
    "white": ((0, 360), (0, 0.03), (0.95, 1)),
    "black": ((0, 360), (0, 0.3), (0, 0.1)),
    "gray": ((0, 360), (0, 0.05), (0.5, 0.75)),
    "light blue": ((195, 220), (0.2, 0.42), (0.88, 1)),
    "light green": ((95, 140), (0.2, 0.4), (0.85, 0.98)),
    "light yellow": ((50, 60), (0.15, 0.38), (0.95, 1)),
    "dark blue": ((215, 240), (0.65, 1), (0.2, 0.4)),
    "dark green": ((110, 160), (0.5, 1), (0.15, 0.32)),
}
_LEAST_DISTANCE = 170


def colour(name: str, random: Random) -> RGB:
    """A shade of a colour."""
    return _draw(_COLOURS[name], random)


def background(name: str, random: Random) -> RGB:
    """A shade of a background."""
    return _draw(_BACKGROUNDS[name], random)


def distance(a: RGB, b: RGB) -> float:
    """How different two colours look; 0 to about 765 (T. Riemersma's "redmean" approximation)."""
    mean = (a[0] + b[0]) / 2
    red, green, blue = (x - y for x, y in zip(a, b, strict=True))
    weighted = (2 + mean / 256) * red * red + 4 * green * green + (2 + (255 - mean) / 256) * blue * blue
    return float(weighted**0.5)


def stands_out(shade: RGB, behind: RGB) -> bool:
    """Whether one colour can be told from another that surrounds it."""
    return distance(shade, behind) >= _LEAST_DISTANCE


@cache
def colours_on(name: str) -> tuple[str, ...]:
    """The colours most of whose shades stand out from most shades of a background."""
    return _standing_out(_BACKGROUNDS[name], Random(name))


@cache
def colours_over(name: str) -> tuple[str, ...]:
    """The same for what lies on something of a colour."""
    return _standing_out(_COLOURS[name], Random(name))


def _standing_out(behind: Ranges, random: Random) -> tuple[str, ...]:
    found = []
    for candidate in _COLOURS:
        pairs = [(colour(candidate, random), _draw(behind, random)) for _ in range(60)]
        if sum(stands_out(*pair) for pair in pairs) > 45:
            found.append(candidate)
    return tuple(found)


def _draw(ranges: Ranges, random: Random) -> RGB:
    hue, saturation, value = (random.uniform(*limits) for limits in ranges)
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)
