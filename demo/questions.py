"""Questions about scenes, with their true answers."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from demo.world import COLOURS, KINDS, NUMBERS, PLACES, Bar, Scene, Shape

CANNOT_TELL = "I cannot tell. This is not a picture that I understand."
EMPTY = "I cannot tell. The picture seems to be empty."


TOPICS = ("color", "kind", "place", "size", "count", "yes/no", "compare", "read", "chart", "describe", "honest", "talk")


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    topic: str
    """One of `TOPICS`, behind "follow-up " where the question goes on from the one before."""
    question: str
    answer: str
    about: Shape | None = None
    """What a follow-up's "it" would mean."""


Asker = Callable[[Scene, Random], Turn | None]


def ask(scene: Scene, random: Random, last: Turn | None = None) -> Turn:
    """A question about a scene; one that goes on from the last one now and then."""
    if last is not None and last.about is not None and random.random() < 0.35:
        return _follow_up(scene, last.about, last, random)
    while True:
        turn = random.choice(_askers(scene))(scene, random)
        if turn is not None:
            return turn


def ask_about(topic: str, scene: Scene, random: Random, tries: int = 200) -> Turn | None:
    """A question of one topic that can be understood without another before it; None if the scene gives none."""
    found = (ask(scene, random) for _ in range(tries))
    return next((turn for turn in found if turn.topic == topic), None)


def _askers(scene: Scene) -> tuple[Asker, ...]:
    if scene.strange or scene.is_blank:
        return (_hopeless,)
    if scene.bars:
        return _ABOUT_BARS
    if scene.words and scene.shapes:
        return (*_ABOUT_WORDS, *_ABOUT_WORDS, *_ABOUT_SHAPES)
    return _ABOUT_WORDS if scene.words else _ABOUT_SHAPES


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def full_name(shape: Shape) -> str:
    """Size, colour and kind."""
    return f"{shape.size} {shape.colour} {shape.kind}"


def listed(parts: list[str]) -> str:
    """Joined as in a sentence."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def counted(number: int, noun: str) -> str:
    """The number in words and the noun in its form."""
    if number == 1:
        return f"one {noun}"
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{NUMBERS[number]} {plural}"


def _plural(noun: str) -> str:
    return counted(2, noun).removeprefix("two ")


def _names(shape: Shape, scene: Scene, *, without: str = "") -> list[str]:
    """Noun phrases that mean just this shape and do not give `without` away."""
    forms = {
        "kind": (shape.kind, lambda s: s.kind == shape.kind),
        "colour": (f"{shape.colour} shape", lambda s: s.colour == shape.colour),
        "colour kind": (
            f"{shape.colour} {shape.kind}", lambda s: (s.colour, s.kind) == (shape.colour, shape.kind)
        ),
        "size kind": (f"{shape.size} {shape.kind}", lambda s: (s.size, s.kind) == (shape.size, shape.kind)),
        "size colour": (f"{shape.size} {shape.colour} shape", lambda s: (s.size, s.colour) == (shape.size, shape.colour)),
        "place": (f"shape {PLACES[shape.place]}", lambda s: s.place == shape.place),
    }  # fmt: skip
    return [
        text
        for key, (text, means) in forms.items()
        if without not in key.split() and sum(map(means, scene.shapes)) == 1
    ]


def _pick(scene: Scene, random: Random, without: str) -> tuple[Shape, str] | None:
    """A shape and a name for it."""
    if not scene.shapes:
        return None
    shape = random.choice(scene.shapes)
    names = _names(shape, scene, without=without)
    return (shape, random.choice(names)) if names else None


def _answer(property_: str, shape: Shape) -> str:
    return {
        "color": f"It is {shape.colour}.",
        "kind": f"It is {article(shape.kind)}.",
        "place": f"It is {PLACES[shape.place]}.",
        "size": f"It is {shape.size}.",
    }[property_]


_QUESTIONS = {
    "color": (
        "What color is the {}?", "What colour is the {}?", "Which color does the {} have?", "What is the color of the {}?",
        "The {}: what color is it?", "Tell me the color of the {}.", "Which color is the {}?",
    ),
    "place": (
        "Where is the {}?", "Where can I find the {}?", "In which part of the picture is the {}?",
        "What is the position of the {}?", "Where do you see the {}?", "Locate the {}.",
    ),
    "size": ("How big is the {}?", "Is the {} small or large?", "What size is the {}?", "How large is the {}?"),
    "kind": (
        "What is the {}?", "What kind of shape is the {}?", "Which shape is the {}?", "What form does the {} have?",
        "Name the {}.",
    ),
}  # fmt: skip
_HIDDEN = {"color": "colour", "place": "place", "size": "size", "kind": "kind"}


def _property(property_: str) -> Asker:
    def asker(scene: Scene, random: Random) -> Turn | None:
        picked = _pick(scene, random, _HIDDEN[property_])
        if picked is None:
            return None
        shape, name = picked
        return Turn(property_, random.choice(_QUESTIONS[property_]).format(name), _answer(property_, shape), shape)

    return asker


def _what_is_at(scene: Scene, random: Random) -> Turn | None:
    if scene.words:
        return None
    place = random.randrange(9)
    form = random.choice(("What is {}?", "What do you see {}?", "What can be seen {}?", "Is there anything {}?"))
    shape = next((s for s in scene.shapes if s.place == place), None)
    answer = "There is nothing." if shape is None else f"There is {article(full_name(shape))}."
    return Turn("kind", form.format(PLACES[place]), answer, shape)


def _absent(scene: Scene, random: Random) -> Turn | None:
    """A property of a thing that is not there, or of one of several."""
    kind = random.choice(KINDS)
    number = sum(shape.kind == kind for shape in scene.shapes)
    if number == 1:
        return None
    form = random.choice(_QUESTIONS[random.choice(("color", "place", "size"))])
    return Turn("honest", form.format(kind), f"There {'is' if number == 1 else 'are'} {counted(number, kind)}.")


_COUNTS = (
    "How many {} are there?", "How many {} do you see?", "How many {} are in the picture?", "Count the {}.",
    "What is the number of {}?", "Number of {}?",
)  # fmt: skip


def _count(scene: Scene, random: Random) -> Turn | None:
    colour, kind = random.choice(COLOURS), random.choice(KINDS)
    if scene.shapes and random.random() < 0.75:
        one = random.choice(scene.shapes)
        colour, kind = one.colour, one.kind
    noun, number = random.choice((
        ("shape", len(scene.shapes)),
        (kind, sum(s.kind == kind for s in scene.shapes)),
        (kind, sum(s.kind == kind for s in scene.shapes)),
        (f"{colour} shape", sum(s.colour == colour for s in scene.shapes)),
        (f"{colour} {kind}", sum((s.colour, s.kind) == (colour, kind) for s in scene.shapes)),
    ))  # fmt: skip
    return _counted("count", noun, number, random)


def _counted(topic: str, noun: str, number: int, random: Random) -> Turn:
    verb = "is" if number == 1 else "are"
    return Turn(topic, random.choice(_COUNTS).format(_plural(noun)), f"There {verb} {counted(number, noun)}.")


def _exists(scene: Scene, random: Random) -> Turn | None:
    colour, kind = random.choice(COLOURS), random.choice(KINDS)
    if scene.shapes and random.random() < 0.7:
        colour, kind = random.choice(scene.shapes).colour, random.choice(scene.shapes).kind
    noun, found = random.choice((
        (kind, any(s.kind == kind for s in scene.shapes)),
        (f"{colour} shape", any(s.colour == colour for s in scene.shapes)),
        (f"{colour} {kind}", any((s.colour, s.kind) == (colour, kind) for s in scene.shapes)),
        (f"{colour} {kind}", any((s.colour, s.kind) == (colour, kind) for s in scene.shapes)),
    ))  # fmt: skip
    forms = ("Is there {a}?", "Do you see {a}?", "Can you see {a}?", "Does the picture show {a}?", "Are there any {s}?",
             "Is {a} in the picture?")  # fmt: skip
    question = random.choice(forms).format(a=article(noun), s=_plural(noun))
    return Turn("yes/no", question, "Yes." if found else "No.")


def _is_it(scene: Scene, random: Random) -> Turn | None:
    """Whether a shape has a property; what it has instead."""
    property_ = random.choice(("color", "place", "size"))
    picked = _pick(scene, random, _HIDDEN[property_])
    if picked is None:
        return None
    shape, name = picked
    truth = {"color": shape.colour, "place": PLACES[shape.place], "size": shape.size}[property_]
    others = {"color": COLOURS, "place": PLACES, "size": ("small", "large")}[property_]
    claimed = truth if random.random() < 0.5 else random.choice(others)
    answer = "Yes." if claimed == truth else f"No, it is {truth}."
    return Turn("yes/no", f"Is the {name} {claimed}?", answer, shape)


def _two(scene: Scene, random: Random, without: str) -> tuple[Shape, str, Shape, str] | None:
    if len(scene.shapes) < 2:
        return None
    first, second = random.sample(scene.shapes, 2)
    names = [[n for n in _names(s, scene, without=without) if not n.startswith("shape ")] for s in (first, second)]
    if not all(names):
        return None
    return first, random.choice(names[0]), second, random.choice(names[1])


def _more(scene: Scene, random: Random) -> Turn | None:
    kinds = sorted({s.kind for s in scene.shapes} | {random.choice(KINDS)})
    if len(kinds) < 2:
        return None
    first, second = random.sample(kinds, 2)
    numbers = [sum(s.kind == kind for s in scene.shapes) for kind in (first, second)]
    more = random.random() < 0.6
    word = "more" if more else "fewer"
    truth = numbers[0] > numbers[1] if more else numbers[0] < numbers[1]
    form = random.choice(("Are there {} {} than {}?", "Do you see {} {} than {}?"))
    return Turn("compare", form.format(word, _plural(first), _plural(second)), "Yes." if truth else "No.")


def _relation(scene: Scene, random: Random) -> Turn | None:
    two = _two(scene, random, "place")
    if two is None:
        return None
    first, name, second, other = two
    relations = {
        "to the left of": second.column - first.column, "to the right of": first.column - second.column,
        "above": second.row - first.row, "below": first.row - second.row,
    }  # fmt: skip
    chosen = random.choice([word for word, steps in relations.items() if steps] or ["above"])
    if not relations[chosen]:
        return None
    return Turn("compare", f"Is the {name} {chosen} the {other}?", "Yes." if relations[chosen] > 0 else "No.")


def _larger(scene: Scene, random: Random) -> Turn | None:
    two = _two(scene, random, "size")
    if two is None or two[0].size == two[2].size:
        return None
    first, name, _, other = two
    large = random.random() < 0.6
    word = random.choice(("larger", "bigger")) if large else "smaller"
    if random.random() < 0.5:
        truth = (first.size == "large") == large
        return Turn("compare", f"Is the {name} {word} than the {other}?", "Yes." if truth else "No.")
    winner = name if (first.size == "large") == large else other
    return Turn("compare", f"Which is {word}, the {name} or the {other}?", f"The {winner} is {word}.")


def _same_colour(scene: Scene, random: Random) -> Turn | None:
    two = _two(scene, random, "colour")
    if two is None:
        return None
    first, name, second, other = two
    answer = "Yes." if first.colour == second.colour else "No."
    form = random.choice(("Do the {} and the {} have the same color?", "Are the {} and the {} of the same color?"))
    return Turn("compare", form.format(name, other), answer)


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
        sentences.append(_reading(scene))
    if scene.bars:
        bars = listed([f"{bar.label} is {bar.colour}" for bar in scene.bars])
        sentences.append(f"This is a bar chart: {bars}. Bar {_extreme(scene, max).label} is the tallest.")
    return " ".join(sentences) or (CANNOT_TELL if scene.strange else EMPTY)


def _reading(scene: Scene) -> str:
    return "It says " + listed([f'"{word.text}"' for word in scene.words]) + "."


def _read(scene: Scene, random: Random) -> Turn | None:
    forms = ("What does it say?", "Read the text.", "What is written here?", "What does the text say?", "What is written?",
             "Which text do you see?", "What word is this?", "Can you read it?", "What is printed in the picture?",
             "Please read the text.", "What number is this?", "Read the number.", "Read it.")  # fmt: skip
    return Turn("read", random.choice(forms), _reading(scene) if scene.words else "There is no text.")


def _read_or_not(scene: Scene, random: Random) -> Turn | None:
    return _read(scene, random) if scene.words or random.random() < 0.3 else None


def _letters(scene: Scene, random: Random) -> Turn | None:
    if len(scene.words) != 1:
        return None
    forms = ("What color are the letters?", "What color is the text?", "In which color is it written?",
             "What color is the writing?")  # fmt: skip
    return Turn("color", random.choice(forms), f"The text is {scene.words[0].colour}.")


def _count_words(scene: Scene, random: Random) -> Turn | None:
    return _counted("count", "word", len(scene.words), random)


def _says(scene: Scene, random: Random) -> Turn | None:
    text = scene.words[0].text
    claimed = text
    if random.random() < 0.5:
        i = random.randrange(len(text))
        letters = "0123456789" if text.isdigit() else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        claimed = text[:i] + random.choice(letters) + text[i + 1 :]
    truth = any(word.text == claimed for word in scene.words)
    form = random.choice(('Does it say "{}"?', 'Is "{}" written there?', 'Do you see the word "{}"?'))
    return Turn("yes/no", form.format(claimed), "Yes." if truth else "No.")


def _extreme(scene: Scene, chosen: Callable[..., Bar]) -> Bar:
    return chosen(scene.bars, key=lambda bar: bar.height)


def _tallest(scene: Scene, random: Random) -> Turn | None:
    words = random.choice(
        ((max, "tallest"), (max, "highest"), (max, "largest"), (min, "shortest"), (min, "lowest"), (min, "smallest"))
    )
    bar = _extreme(scene, words[0])
    if random.random() < 0.3:
        form = random.choice(("What color is the {} bar?", "Which color does the {} bar have?"))
        return Turn("chart", form.format(words[1]), f"The {words[1]} bar is {bar.colour}.")
    form = random.choice(
        ("Which bar is the {}?", "What is the {} bar?", "Which one is the {} bar?", "Name the {} bar.")
    )
    return Turn("chart", form.format(words[1]), f"Bar {bar.label} is the {words[1]}.")


def _bar_colour(scene: Scene, random: Random) -> Turn | None:
    bar = random.choice(scene.bars)
    answer = f"Bar {bar.label} is {bar.colour}."
    if random.random() < 0.5:
        form = random.choice(("What color is bar {}?", "Which color does bar {} have?", "What is the color of bar {}?"))
        return Turn("chart", form.format(bar.label), answer)
    return Turn("chart", random.choice(("Which bar is {}?", "What is the {} bar called?")).format(bar.colour), answer)


def _taller(scene: Scene, random: Random) -> Turn | None:
    first, second = random.sample(scene.bars, 2)
    taller = random.random() < 0.6
    word = random.choice(("taller", "higher", "larger")) if taller else random.choice(("shorter", "lower", "smaller"))
    truth = (first.height > second.height) == taller
    return Turn("compare", f"Is bar {first.label} {word} than bar {second.label}?", "Yes." if truth else "No.")


def _count_bars(scene: Scene, random: Random) -> Turn | None:
    return _counted("chart", "bar", len(scene.bars), random)


def _hopeless(scene: Scene, random: Random) -> Turn | None:
    kind, colour = random.choice(KINDS), random.choice(COLOURS)
    forms = [*_DESCRIBE, f"What color is the {kind}?", f"Where is the {kind}?", f"How many {_plural(kind)} are there?",
             "What does it say?", "What is written here?", f"Is there {article(f'{colour} {kind}')}?", "Which bar is the tallest?",
             "How many shapes are there?", f"What is {PLACES[random.randrange(9)]}?", "What color is the background?"]  # fmt: skip
    return Turn("honest", random.choice(forms), description(scene))


def _follow_up(scene: Scene, shape: Shape, last: Turn, random: Random) -> Turn:
    """A question whose "it" is what was spoken of, or the same question about another shape."""
    others = [s for s in scene.shapes if s is not shape]
    if last.topic in _HIDDEN and others and random.random() < 0.4:
        other = random.choice(others)
        names = _names(other, scene, without=_HIDDEN[last.topic])
        if names:
            form = random.choice(("And the {}?", "What about the {}?", "And what about the {}?"))
            return Turn(f"follow-up {last.topic}", form.format(random.choice(names)), _answer(last.topic, other), other)
    forms = {
        "color": ("What color is it?", "And its color?", "Which color does it have?"),
        "place": ("Where is it?", "Where is it in the picture?", "And where is it?"),
        "size": ("How big is it?", "Is it small or large?", "What size is it?"),
        "kind": ("What shape is it?", "What kind of shape is it?", "What is it?"),
    }
    property_ = random.choice([name for name in forms if name != last.topic])
    return Turn(f"follow-up {property_}", random.choice(forms[property_]), _answer(property_, shape), shape)


_ABOUT_SHAPES: tuple[Asker, ...] = (
    _property("color"), _property("color"), _property("kind"), _property("kind"), _property("place"), _property("place"),
    _property("size"), _what_is_at, _absent, _count, _count, _count, _exists, _exists, _is_it, _more, _relation, _larger,
    _same_colour, _background, _describe, _describe, _read_or_not,
)  # fmt: skip
_ABOUT_WORDS: tuple[Asker, ...] = (_read, _read, _read, _letters, _count_words, _says, _background, _describe)
_ABOUT_BARS: tuple[Asker, ...] = (
    _tallest, _tallest, _tallest, _bar_colour, _bar_colour, _taller, _taller, _count_bars, _background, _describe,
    _read_or_not,
)  # fmt: skip
