"""What the benchmarks send: seeded questions, with pictures that compress and prepare as photographs do."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

_TEXT = (
    "tell me what the picture shows and how many large small red green blue things there are near or behind the tree "
    "house car dog street river window table on which side of it someone stands with a book hat bag umbrella"
)
_WORDS = _TEXT.split()
_JPEG_QUALITY = 85

Size = tuple[int, int] | None
"""Width and height; None: no picture."""


@dataclass(frozen=True, slots=True)
class Load:
    """The same arguments give the same requests, byte for byte."""

    sizes: tuple[Size, ...] = ((640, 480),)
    """Of pictures: each conversation draws one of them; a size that stands twice is drawn twice as often."""
    images: int = 1
    """In each conversation that has any."""
    same_image: bool = False
    """Whether all conversations show one picture, or one of each size."""
    prompt_words: int = 32
    seed: int = 0


def picture(random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A picture (RGB) of blurred areas, hard edges and a little noise."""
    width, height = size
    coarse = random.integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
    for _ in range(8):
        left, top = (int(random.integers(0, side)) for side in size)
        patch = tuple(int(level) for level in random.integers(0, 256, 3))
        image.paste(patch, (left, top, left + max(1, width // 6), top + max(1, height // 6)))
    noise = random.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def question(random: np.random.Generator, words: int) -> str:
    """So many words, nonsense."""
    return " ".join(_WORDS[i] for i in random.integers(0, len(_WORDS), max(1, words)))


def size_of(load: Load, index: int) -> Size:
    """Of the pictures of conversation number `index`, in every part, so that all runs of a sweep bear the same load."""
    return load.sizes[np.random.default_rng((load.seed, index, 4)).integers(len(load.sizes))]


def size_name(size: Size) -> str:
    """`640x480`, or `none`."""
    return "none" if size is None else "x".join(map(str, size))


def pictures(load: Load, part: int, index: int) -> list[Image.Image]:
    """Those of conversation number `index`; the warm-up and each run are parts, which share nothing else."""
    size = size_of(load, index)
    if size is None:
        return []
    keys = [(load.seed, 0, 0, i) if load.same_image else (load.seed, part, index, i) for i in range(load.images)]
    return [picture(np.random.default_rng((*key, 1)), size) for key in keys]


def text(load: Load, part: int, index: int, turn: int = 0) -> str:
    """What conversation number `index` asks in a turn."""
    return question(np.random.default_rng((load.seed, part, index, 2, turn)), load.prompt_words)


def message(load: Load, part: int, index: int, turn: int = 0) -> dict[str, Any]:
    """What the user says in a turn of conversation number `index`; pictures stand in the first."""
    images = pictures(load, part, index) if turn == 0 else []
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text(load, part, index, turn)}]}


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
