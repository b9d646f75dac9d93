"""The pictures of `demo/samples`.

    python -m demo.make_samples

writes them anew.
"""

from pathlib import Path
from random import Random

from PIL import Image

from demo.drawing import draw_scene
from demo.world import Bar, Scene, Shape, Word

FOLDER = Path(__file__).parent / "samples"
_JPEG_QUALITY = 90

_SHAPES = Scene(
    "light green",
    shapes=[
        Shape("rectangle", "orange", "large", 0, 0.19, 0.19, 0.14, -32),
        Shape("ring", "brown", "small", 5, 0.84, 0.45, 0.083, 0),
        Shape("star", "pink", "large", 6, 0.24, 0.76, 0.14, 12),
    ],
)
_WORD = Scene("light yellow", words=[Word("HELLO", "blue", 1, 0.5, 0.45, 0.8, 0.4, -6)])
_CHART = Scene(
    "white", bars=[Bar("A", "black", 0.73), Bar("B", "yellow", 0.98), Bar("C", "blue", 0.37), Bar("D", "orange", 0.5)]
)
SAMPLES = {"shapes.png": (_SHAPES, (252, 299)), "word.png": (_WORD, (280, 175)), "chart.jpg": (_CHART, (300, 240))}
"""For each file what it shows, and its width and height."""


def make_sample(name: str) -> Image.Image:
    """The picture of a file, before it is compressed."""
    scene, size = SAMPLES[name]
    return draw_scene(scene, size, Random(name))[0]


def main() -> None:
    """Write all of them."""
    for name in SAMPLES:
        make_sample(name).save(FOLDER / name, quality=_JPEG_QUALITY)


if __name__ == "__main__":
    main()
