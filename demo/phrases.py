"""What a question and its answer are, and the grammar that they share."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from demo.world import NUMBERS, Scene, Shape

TOPICS = (
    "color", "kind", "place", "size", "count", "yes/no", "compare", "read", "chart", "describe", "json", "honest",
    "talk",
)  # fmt: skip


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
    return f"{NUMBERS[number]} {plural(noun)}"


def plural(noun: str) -> str:
    """The noun for several."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


_COUNTS = (
    "How many {} are there?", "How many {} do you see?", "How many {} are in the picture?", "Count the {}.",
    "What is the number of {}?", "Number of {}?",
)  # fmt: skip


def count_turn(topic: str, noun: str, number: int, random: Random) -> Turn:
    """A question for a number, and its answer."""
    verb = "is" if number == 1 else "are"
    return Turn(topic, random.choice(_COUNTS).format(plural(noun)), f"There {verb} {counted(number, noun)}.")
