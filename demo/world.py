"""What the demo model's pictures consist of, and the words for it."""

from dataclasses import dataclass, field
from typing import Literal

KINDS = ("circle", "square", "triangle", "rectangle", "star", "heart", "cross", "ring", "moon")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the center", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
BACKGROUND_NAMES = (
    "white", "black", "gray", "light blue", "light green", "light yellow", "dark blue", "dark green",
)  # fmt: skip
MOST_SHAPES = 6

Size = Literal["small", "large"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape. Lengths are in units of the square root of the picture's area, the centre in shares of its sides."""

    kind: str
    colour: str
    size: Size
    place: int
    """Index into `PLACES`: the ninth of the picture that holds its centre."""
    x: float
    y: float
    radius: float
    angle: float
    """Degrees."""

    @property
    def row(self) -> int:
        """0 at the top, 2 at the bottom."""
        return self.place // 3

    @property
    def column(self) -> int:
        """0 on the left, 2 on the right."""
        return self.place % 3


@dataclass(frozen=True, slots=True)
class Word:
    """Printed capital letters or digits."""

    text: str
    colour: str
    font: int
    x: float
    y: float
    """Of its centre, in shares of the picture's sides."""
    width: float
    """The widest it may be, in shares of the picture's width."""
    height: float
    """Of its letters at most, in shares of the picture's height."""
    angle: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart."""

    label: str
    colour: str
    height: float
    """Above 0, at most 1."""


@dataclass(slots=True)
class Scene:
    """All that is to be seen in a picture, and so all that can be asked about it."""

    background: str
    shapes: list[Shape] = field(default_factory=list)
    """In reading order: by row, then from left to right."""
    words: list[Word] = field(default_factory=list)
    """From top to bottom."""
    bars: list[Bar] = field(default_factory=list)
    """From left to right."""
    strange: bool = False
    """A picture of another world: a photograph, a texture, a scribble."""

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing but a background."""
        return not (self.shapes or self.words or self.bars or self.strange)
