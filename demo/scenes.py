"""A seeded generator of pictures and conversations about them.

    python -m demo.scenes --out DIR [--seed N] [--count N]

writes some of them as files, with their questions and answers.
"""

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from demo.drawing import NUM_FONTS, Labels, draw_scene, lies_below
from demo.lexicon import printed_text
from demo.palette import colours_on, colours_over
from demo.phrases import Turn
from demo.questions import ask
from demo.talk import aside, talk
from demo.wear import strange_picture, wear
from demo.world import BACKGROUND_NAMES, KINDS, MOST_SHAPES, Bar, Scene, Shape, Size, Word

_RADII: dict[Size, tuple[float, float]] = {"small": (0.066, 0.086), "large": (0.125, 0.165)}
_TURNS = {"square": 18, "heart": 30, "cross": 18, "circle": 0, "ring": 0}
"""Degrees either way within which a kind keeps its name; the others may be turned at will."""
_SHORTEST, _LONGEST = 100, 2000
_FEATURES = ("shapes", "words", "words and shapes", "chart", "strange", "blank")
_SHARES = (0.38, 0.31, 0.11, 0.145, 0.035, 0.02)
_LEAST_LETTER = 0.065
"""Height of a letter at least, as a share of the picture's longer side, where the width leaves room for it."""


@dataclass(slots=True)
class Example:
    """A picture and a conversation about it."""

    scene: Scene
    image: Image.Image
    labels: Labels
    turns: list[Turn]


def make_example(
    seed: int,
    index: int,
    *,
    feature: str | None = None,
    num_turns: int = 1,
    longest: int = _LONGEST,
    photos: tuple[Image.Image, ...] = (),
) -> Example:
    """Example number `index` of a seed.

    Args:
        seed: examples of different seeds have nothing to do with each other.
        index: of the example.
        feature: one of shapes, words, words and shapes, chart, strange, blank; by default any of them.
        num_turns: questions of the conversation.
        longest: pixels of the longer side at most; smaller pictures are made faster.
        photos: parts of these serve as pictures of another world.
    """
    random = Random(f"{seed}/{index}")
    size = _size(random, longest)
    scene = make_scene(random, size, feature)
    image, labels = _picture(scene, size, random, photos)
    return Example(scene, image, labels, conversation(scene, random, num_turns))


def make_scene(random: Random, size: tuple[int, int], feature: str | None = None) -> Scene:
    """What a picture of this width and height shows."""
    chosen = feature or random.choices(_FEATURES, _SHARES)[0]
    scene = Scene(random.choice(BACKGROUND_NAMES), strange=chosen == "strange")
    if chosen == "chart":
        scene.bars = _bars(scene, size, random)
    if "words" in chosen:
        scene.words = _words(scene, size, random, at_most=1 if "shapes" in chosen else 2)
    if "shapes" in chosen:
        scene.shapes = _shapes(scene, size, random)
    return scene


def _picture(
    scene: Scene, size: tuple[int, int], random: Random, photos: tuple[Image.Image, ...]
) -> tuple[Image.Image, Labels]:
    if scene.strange:
        return wear(strange_picture(size, random, photos), random), Labels(size)
    image, labels = draw_scene(scene, size, random)
    return wear(image, random), labels


def conversation(scene: Scene, random: Random, num_turns: int) -> list[Turn]:
    """Questions and answers, some of them going on from the one before."""
    turns: list[Turn] = []
    for _ in range(num_turns):
        beside = random.random() < 0.03
        turns.append(aside(random) if beside else ask(scene, random, turns[-1] if turns else None))
    return turns


def chat(random: Random, num_turns: int) -> list[Turn]:
    """A conversation without a picture."""
    return [talk(random) for _ in range(num_turns)]


def _size(random: Random, longest: int) -> tuple[int, int]:
    """Width and height: proportions from 1:3 to 3:1, squares more often, all lengths equally often on a log scale."""
    proportion = 1.0 if random.random() < 0.25 else 3 ** random.uniform(-1, 1)
    long_by_short = max(proportion, 1 / proportion)
    long = math.exp(random.uniform(math.log(_SHORTEST * long_by_short), math.log(longest)))
    long, short = round(long), max(_SHORTEST, round(long / long_by_short))
    return (long, short) if proportion > 1 else (short, long)


def _shapes(scene: Scene, size: tuple[int, int], random: Random) -> list[Shape]:
    """Up to six, no two in the same ninth of the picture; like ones come often, for the sake of counting."""
    number = random.randint(1, MOST_SHAPES)
    cells = list(range(9))
    if scene.words:
        row = min(2, int(scene.words[0].y * 3))
        cells = [cell for cell in cells if cell // 3 != row]
    colours = colours_on(scene.background)
    kinds = random.sample(KINDS, random.choice((1, 2, 3, 9)))
    some = random.sample(colours, random.choice((1, 2, 3, len(colours))))
    made: list[Shape] = []
    for cell in random.sample(cells, min(number, len(cells))):
        candidates = (_shape(random, size, cell, kinds, some) for _ in range(20))
        fitting = (shape for shape in candidates if _fits(shape, made, scene.words, size))
        made += itertools.islice(fitting, 1)
    return sorted(made, key=lambda shape: shape.place)


def _shape(random: Random, size: tuple[int, int], cell: int, kinds: list[str], colours: list[str]) -> Shape:
    kind: str = random.choice(kinds)
    how_big: Size = random.choice(("small", "large"))
    turn = _TURNS.get(kind, 180)
    radius = random.uniform(*_RADII[how_big])
    centre = []
    for part, length in zip((cell % 3, cell // 3), size, strict=True):
        least = 0.85 * radius * math.sqrt(size[0] * size[1]) / length  # little of it lies outside the picture
        centre.append(min(max((part + random.uniform(0.2, 0.8)) / 3, least), 1 - least))
    return Shape(kind, random.choice(colours), how_big, cell, centre[0], centre[1], radius, random.uniform(-turn, turn))


def _fits(shape: Shape, others: list[Shape], words: list[Word], size: tuple[int, int]) -> bool:
    """Whether nothing that is there already becomes hard to see."""
    unreadable = any(lies_below(shape, w, size) and w.colour not in colours_over(shape.colour) for w in words)
    return not unreadable and not any(_hides(shape, other, size) for other in others)


def _hides(one: Shape, other: Shape, size: tuple[int, int]) -> bool:
    """Whether two shapes are too close to be told apart."""
    unit = math.sqrt(size[0] * size[1])
    apart = math.hypot((one.x - other.x) * size[0], (one.y - other.y) * size[1]) / unit
    return apart < (0.95 if one.colour == other.colour else 0.65) * (one.radius + other.radius)


def _words(scene: Scene, size: tuple[int, int], random: Random, at_most: int) -> list[Word]:
    number = random.randint(1, at_most)
    rows = sorted(random.sample(range(3), number)) if at_most > 1 else [random.choice((0, 2))]
    alone = at_most > 1 and number == 1
    least = _LEAST_LETTER * max(size) / size[1]
    most = 0.5 if alone else 0.24
    return [
        Word(
            text=printed_text(random),
            colour=random.choice(colours_on(scene.background)),
            font=random.randrange(NUM_FONTS),
            x=random.uniform(0.2, 0.8),
            y=random.uniform(0.1, 0.9) if alone else (row + 0.5) / 3,
            width=random.uniform(0.6, 0.92),
            height=random.uniform(least, max(most, least)),
            angle=random.choice((0.0, random.uniform(-8, 8))),
        )
        for row in rows
    ]


def _bars(scene: Scene, size: tuple[int, int], random: Random) -> list[Bar]:
    """Three to five of different colours; neighbours in height differ by an eighth of the chart at least."""
    proportion = size[0] / size[1]
    number = random.randint(3, 3 if proportion < 0.5 else 4 if proportion < 0.75 else 5)
    colours = random.sample(colours_on(scene.background), number)
    steps = random.sample(range(1, 9), number)
    labels = "ABCDE" if random.random() < 0.6 else random.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", number)
    return [Bar(labels[i], colours[i], (steps[i] + random.uniform(-0.15, 0.15)) / 8.2) for i in range(number)]


def main() -> None:
    """Write examples."""
    parser = argparse.ArgumentParser(prog="python -m demo.scenes", description="Write pictures and conversations.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples (default: 0)")
    parser.add_argument("--count", type=int, default=20, help="number of examples (default: 20)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for index in range(args.count):
        example = make_example(args.seed, index, num_turns=5)
        example.image.save(args.out / f"{index:04}.png")
        turns = [{"topic": turn.topic, "question": turn.question, "answer": turn.answer} for turn in example.turns]
        (args.out / f"{index:04}.json").write_text(json.dumps(turns, indent=1))


if __name__ == "__main__":
    main()
