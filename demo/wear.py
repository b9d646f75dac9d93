"""What befalls pictures on their way: noise, blur, JPEG; and pictures of another world."""

import io
from functools import lru_cache
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

_TILE = 1024


def wear(image: Image.Image, random: Random) -> Image.Image:
    """Perhaps noise, perhaps blur, perhaps JPEG."""
    if random.random() < 0.35:
        image = _add_noise(image, random.uniform(2, 18), random)
    if random.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(min(image.size) * random.uniform(0.001, 0.005)))
    if random.random() < 0.4:
        image = _through_jpeg(image, random.randint(35, 95))
    return image


@lru_cache(maxsize=1)
def _noise_tile() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((_TILE, _TILE, 3), np.float32)


def _add_noise(image: Image.Image, strength: float, random: Random) -> Image.Image:
    values = np.asarray(image, np.float32)
    rows = (np.arange(image.height) + random.randrange(_TILE)) % _TILE
    columns = (np.arange(image.width) + random.randrange(_TILE)) % _TILE
    noisy = values + _noise_tile()[rows[:, None], columns[None, :]] * np.float32(strength)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def strange_picture(size: tuple[int, int], random: Random, photos: tuple[Image.Image, ...] = ()) -> Image.Image:
    """A picture that has no shapes, words or charts in it: part of a photograph, or what looks a little like one."""
    if photos and random.random() < 0.6:
        return _photo_part(size, random, photos)
    return random.choice((_cloud, _cloud, _clutter, _scribble, _mosaic))(size, random)


def _photo_part(size: tuple[int, int], random: Random, photos: tuple[Image.Image, ...]) -> Image.Image:
    photo = random.choice(photos)
    share = random.uniform(0.45, 1)
    scale = share * min(photo.width / size[0], photo.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    x, y = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
    part = photo.resize(size, Image.Resampling.BILINEAR, (x, y, x + width, y + height), reducing_gap=2)
    if random.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    table = [min(255, int(level * gain + lift)) for gain, lift in _tints(random) for level in range(256)]
    return part.point(table)


def _tints(random: Random) -> list[tuple[float, float]]:
    return [(random.uniform(0.6, 1.2), random.uniform(0, 30)) for _ in range(3)]


def _cloud(size: tuple[int, int], random: Random) -> Image.Image:
    """Coloured noise of all scales, as in nature."""
    generator = np.random.default_rng(random.getrandbits(32))
    steep = random.uniform(0.4, 0.75)
    total = np.zeros((96, 96, 3), np.float32)
    for octave, cells in enumerate((3, 6, 12, 24, 48, 96)):
        layer = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(layer.resize((96, 96), Image.Resampling.BICUBIC), np.float32) * steep**octave
    total -= total.min((0, 1))
    total *= 255 / total.max((0, 1))
    return Image.fromarray(total.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def _clutter(size: tuple[int, int], random: Random) -> Image.Image:
    """Dozens of torn patches over each other."""
    image = _cloud(size, random)
    draw = ImageDraw.Draw(image)
    for _ in range(random.randint(40, 120)):
        x, y = random.uniform(0, size[0]), random.uniform(0, size[1])
        reach = random.uniform(0.03, 0.25) * min(size)
        points = [(x + random.gauss(0, reach), y + random.gauss(0, reach)) for _ in range(random.randint(3, 7))]
        draw.polygon(points, fill=_any_colour(random))
    return image.filter(ImageFilter.GaussianBlur(min(size) * random.uniform(0.002, 0.02)))


def _scribble(size: tuple[int, int], random: Random) -> Image.Image:
    image = Image.new("RGB", size, _any_colour(random))
    draw = ImageDraw.Draw(image)
    for _ in range(random.randint(6, 40)):
        x, y = random.uniform(0, size[0]), random.uniform(0, size[1])
        points = [(x, y)]
        for _ in range(random.randint(3, 20)):
            x, y = x + random.gauss(0, 0.08) * size[0], y + random.gauss(0, 0.08) * size[1]
            points.append((x, y))
        draw.line(points, fill=_any_colour(random), width=max(1, int(random.uniform(0.003, 0.03) * min(size))))
    return image


def _mosaic(size: tuple[int, int], random: Random) -> Image.Image:
    generator = np.random.default_rng(random.getrandbits(32))
    cells = random.randint(5, 40)
    tiles = generator.integers(0, 256, (cells, cells, 3), np.uint8)
    return Image.fromarray(tiles).resize(size, random.choice((Image.Resampling.NEAREST, Image.Resampling.BILINEAR)))


def _any_colour(random: Random) -> tuple[int, int, int]:
    return random.randrange(256), random.randrange(256), random.randrange(256)
