"""Questions about shapes."""

import json
from random import Random

from demo.phrases import Asker, Turn, article, count_turn, counted, full_name, plural
from demo.world import COLOURS, KINDS, PLACES, Scene, Shape

_SIDES = ((0, 2), (0, 6), (2, 8), (6, 8))
"""The corners at the ends of each side, as indices into `PLACES`."""


def _names(shape: Shape, scene: Scene, *, without: str = "") -> list[str]:
    """Noun phrases that mean just this shape and do not give `without` away."""
    forms = {
        "kind": (shape.kind, lambda s: s.kind == shape.kind),
        "colour": (f"{shape.colour} shape", lambda s: s.colour == shape.colour),
        "colour kind": (
            f"{shape.colour} {shape.kind}", lambda s: (s.colour, s.kind) == (shape.colour, shape.kind)
        ),
        "size kind": (f"{shape.size} {shape.kind}", lambda s: (s.size, s.kind) == (shape.size, shape.kind)),
        "size colour": (
            f"{shape.size} {shape.colour} shape", lambda s: (s.size, s.colour) == (shape.size, shape.colour)
        ),
        "place": (f"shape {PLACES[shape.place]}", lambda s: s is shape or _on_side(s.place, shape.place)),
    }  # fmt: skip
    return [
        text
        for key, (text, means) in forms.items()
        if without not in key.split() and sum(map(means, scene.shapes)) == 1
    ]


def _on_side(corner: int, side: int) -> bool:
    """Whether one place is a corner of the side in whose middle the other one is, so that both may be called by it."""
    return any(side == sum(ends) // 2 and corner in ends for ends in _SIDES)


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
        "What color is the {}?", "What colour is the {}?", "Which color does the {} have?",
        "What is the color of the {}?", "The {}: what color is it?", "Tell me the color of the {}.",
        "Which color is the {}?",
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


def ask_property(property_: str) -> Asker:
    """A question about one property of a shape."""

    def asker(scene: Scene, random: Random) -> Turn | None:
        picked = _pick(scene, random, _HIDDEN[property_])
        if picked is None:
            return None
        shape, name = picked
        return Turn(property_, random.choice(_QUESTIONS[property_]).format(name), _answer(property_, shape), shape)

    return asker


def what_is_at(scene: Scene, random: Random) -> Turn | None:
    """What there is in a ninth of the picture."""
    if scene.words:
        return None
    place = random.randrange(9)
    if any(_on_side(s.place, place) for s in scene.shapes):
        return None
    form = random.choice(("What is {}?", "What do you see {}?", "What can be seen {}?", "Is there anything {}?"))
    shape = next((s for s in scene.shapes if s.place == place), None)
    answer = "There is nothing." if shape is None else f"There is {article(full_name(shape))}."
    return Turn("kind", form.format(PLACES[place]), answer, shape)


def absent(scene: Scene, random: Random) -> Turn | None:
    """A property of a thing that is not there, or of one of several."""
    kind = random.choice(KINDS)
    number = sum(shape.kind == kind for shape in scene.shapes)
    if number == 1:
        return None
    form = random.choice(_QUESTIONS[random.choice(("color", "place", "size"))])
    return Turn("honest", form.format(kind), f"There are {counted(number, kind)}.")


def count(scene: Scene, random: Random) -> Turn | None:
    """How many there are of a kind, a color, or of both."""
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
    return count_turn("count", noun, number, random)


def exists(scene: Scene, random: Random) -> Turn | None:
    """Whether there is such a thing."""
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
    question = random.choice(forms).format(a=article(noun), s=plural(noun))
    return Turn("yes/no", question, "Yes." if found else "No.")


def is_it(scene: Scene, random: Random) -> Turn | None:
    """Whether a shape has a property; what it has instead."""
    property_ = random.choice(("color", "place", "size"))
    picked = _pick(scene, random, _HIDDEN[property_])
    if picked is None:
        return None
    shape, name = picked
    truth = {"color": shape.colour, "place": PLACES[shape.place], "size": shape.size}[property_]
    places = [place for i, place in enumerate(PLACES) if not _on_side(shape.place, i)]
    others = {"color": COLOURS, "place": places, "size": ("small", "large")}[property_]
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


def more(scene: Scene, random: Random) -> Turn | None:
    """Whether there are more of one kind than of another."""
    kinds = sorted({s.kind for s in scene.shapes} | {random.choice(KINDS)})
    if len(kinds) < 2:
        return None
    first, second = random.sample(kinds, 2)
    numbers = [sum(s.kind == kind for s in scene.shapes) for kind in (first, second)]
    more = random.random() < 0.6
    word = "more" if more else "fewer"
    truth = numbers[0] > numbers[1] if more else numbers[0] < numbers[1]
    form = random.choice(("Are there {} {} than {}?", "Do you see {} {} than {}?"))
    return Turn("compare", form.format(word, plural(first), plural(second)), "Yes." if truth else "No.")


def relation(scene: Scene, random: Random) -> Turn | None:
    """Where one shape is, seen from another."""
    two = _two(scene, random, "place")
    if two is None:
        return None
    first, name, second, other = two
    relations = {
        "to the left of": second.column - first.column, "to the right of": first.column - second.column,
        "above": second.row - first.row, "below": first.row - second.row,
    }  # fmt: skip
    chosen = random.choice([word for word, steps in relations.items() if steps])
    return Turn("compare", f"Is the {name} {chosen} the {other}?", "Yes." if relations[chosen] > 0 else "No.")


def larger(scene: Scene, random: Random) -> Turn | None:
    """Which of two shapes is the larger one."""
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


def same_colour(scene: Scene, random: Random) -> Turn | None:
    """Whether two shapes have one color."""
    two = _two(scene, random, "colour")
    if two is None:
        return None
    first, name, second, other = two
    answer = "Yes." if first.colour == second.colour else "No."
    form = random.choice(("Do the {} and the {} have the same color?", "Are the {} and the {} of the same color?"))
    return Turn("compare", form.format(name, other), answer)


_AS_JSON = (
    "List the shapes as JSON.", "Describe the shapes as JSON.", "Which shapes are there? Answer in JSON.",
    "Give me the shapes as JSON.", "Return the shapes as a JSON object.", "Extract the shapes as JSON.",
    "What shapes are in the picture? Use JSON.", "Describe the picture as JSON.",
)  # fmt: skip


def as_json(scene: Scene, random: Random) -> Turn | None:
    """All shapes as data, in reading order."""
    if not scene.shapes:
        return None
    shapes = [{"color": shape.colour, "kind": shape.kind, "size": shape.size} for shape in scene.shapes]
    return Turn("json", random.choice(_AS_JSON), json.dumps({"shapes": shapes}))


def follow_up(scene: Scene, shape: Shape, last: Turn, random: Random) -> Turn:
    """A question whose "it" is what was spoken of, or the same question about another shape."""
    others = [s for s in scene.shapes if s is not shape]
    topic = last.topic.removeprefix("follow-up ")
    if topic in _HIDDEN and others and random.random() < 0.4:
        other = random.choice(others)
        names = _names(other, scene, without=_HIDDEN[topic])
        if names:
            form = random.choice(("And the {}?", "What about the {}?", "And what about the {}?"))
            return Turn(f"follow-up {topic}", form.format(random.choice(names)), _answer(topic, other), other)
    forms = {
        "color": ("What color is it?", "And its color?", "Which color does it have?"),
        "place": ("Where is it?", "Where is it in the picture?", "And where is it?"),
        "size": ("How big is it?", "Is it small or large?", "What size is it?"),
        "kind": ("What shape is it?", "What kind of shape is it?", "What is it?"),
    }
    property_ = random.choice([name for name in forms if name != topic])
    return Turn(f"follow-up {property_}", random.choice(forms[property_]), _answer(property_, shape), shape)
