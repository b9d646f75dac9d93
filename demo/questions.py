"""Questions about scenes, with their true answers."""

from random import Random

from demo import about_absent as absent
from demo import about_prints as prints
from demo import about_shapes as shapes
from demo.phrases import Asker, Turn, article, counted, full_name, listed, plural
from demo.world import COLOURS, KINDS, PLACES, Scene

CANNOT_TELL = "I cannot tell. This is not a picture that I understand."
EMPTY = "I cannot tell. The picture seems to be empty."
_ABSENT_SHARE = 0.08
"""Of the questions, as many are about things that the picture's kind does not hold."""


def ask(scene: Scene, random: Random, last: Turn | None = None) -> Turn:
    """A question about a scene; one that goes on from the last one now and then."""
    if last is not None and last.about is not None and random.random() < 0.35:
        return shapes.follow_up(scene, last.about, last, random)
    while True:
        turn = random.choice(_some_askers(scene, random))(scene, random)
        if turn is not None:
            return turn


def ask_about(topic: str, scene: Scene, random: Random, tries: int = 200) -> Turn | None:
    """A question of one topic that can be understood without another before it; None if the scene gives none."""
    found = (ask(scene, random) for _ in range(tries))
    return next((turn for turn in found if turn.topic == topic), None)


def _some_askers(scene: Scene, random: Random) -> tuple[Asker, ...]:
    if scene.strange:
        return (_hopeless,)
    if scene.is_blank:
        return _ABOUT_NOTHING
    return absent.askers(scene) if random.random() < _ABSENT_SHARE else _askers(scene)


def _askers(scene: Scene) -> tuple[Asker, ...]:
    if scene.bars:
        return _ABOUT_BARS
    if scene.words and scene.shapes:
        return (*_ABOUT_WORDS, *_ABOUT_WORDS, *_ABOUT_SHAPES)
    return _ABOUT_WORDS if scene.words else _ABOUT_SHAPES


def _background(scene: Scene, random: Random) -> Turn | None:
    forms = ("What color is the background?", "Which color does the background have?", "What is the background color?",
             "On what color is it drawn?")  # fmt: skip
    return Turn("color", random.choice(forms), f"The background is {scene.background}.")


_DESCRIBE = (
    "Describe the picture.", "What do you see?", "What is in this picture?", "What is in this image?",
    "Describe this image.", "What does the picture show?", "What can you see?", "Please describe what you see.",
    "What is the content of this image?", "What's in this picture?", "What’s in this image?", "Tell me about this picture.",
)  # fmt: skip


def _describe(scene: Scene, random: Random) -> Turn | None:
    return Turn("describe", random.choice(_DESCRIBE), description(scene))


def description(scene: Scene) -> str:
    """All that is to be seen, in a fixed order."""
    sentences = []
    if scene.shapes:
        parts = [f"{article(full_name(shape))} {PLACES[shape.place]}" for shape in scene.shapes]
        verb = "is" if len(parts) == 1 else "are"
        sentences.append(f"There {verb} {counted(len(parts), 'shape')}: {listed(parts)}.")
    if scene.words:
        sentences.append(prints.reading(scene))
    if scene.bars:
        bars = listed([f"{bar.label} is {bar.colour}" for bar in scene.bars])
        sentences.append(f"This is a bar chart: {bars}. Bar {prints.extreme(scene, max).label} is the tallest.")
    return " ".join(sentences) or (CANNOT_TELL if scene.strange else EMPTY)


def _hopeless(scene: Scene, random: Random) -> Turn | None:
    kind, colour = random.choice(KINDS), random.choice(COLOURS)
    forms = [*_DESCRIBE, f"What color is the {kind}?", f"Where is the {kind}?", f"How many {plural(kind)} are there?",
             "What does it say?", "What is written here?", f"Is there {article(f'{colour} {kind}')}?", "Which bar is the tallest?",
             "How many shapes are there?", f"What is {PLACES[random.randrange(9)]}?"]  # fmt: skip
    if scene.strange:
        forms.append("What color is the background?")
    return Turn("honest", random.choice(forms), description(scene))


# What is asked more often stands here more often.
_ABOUT_SHAPES: tuple[Asker, ...] = (
    *(shapes.ask_property(name) for name in ("color", "color", "kind", "kind", "place", "place", "place", "size")),
    shapes.what_is_at, shapes.absent, shapes.count, shapes.count, shapes.count, shapes.exists, shapes.exists,
    shapes.is_it, shapes.more, shapes.relation, shapes.relation, shapes.larger, shapes.same_colour, _background,
    _describe, _describe, shapes.as_json, shapes.as_json,
)  # fmt: skip
_ABOUT_WORDS: tuple[Asker, ...] = (
    prints.read, prints.read, prints.read, prints.read, prints.letters, prints.count_words, prints.says, _background,
    _describe,
)  # fmt: skip
_ABOUT_BARS: tuple[Asker, ...] = (
    prints.tallest, prints.tallest, prints.tallest, prints.bar_colour, prints.bar_colour, prints.taller, prints.taller,
    prints.taller, prints.count_bars, prints.labels, _background, _describe,
)  # fmt: skip
_ABOUT_NOTHING: tuple[Asker, ...] = (_hopeless, _hopeless, _hopeless, _hopeless, _background)
