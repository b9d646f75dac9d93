"""Questions about printed words and about bar charts."""

from collections.abc import Callable
from random import Random

from demo.phrases import Turn, count_turn, listed
from demo.world import Bar, Scene


def reading(scene: Scene) -> str:
    """All that is written."""
    return "It says " + listed([f'"{word.text}"' for word in scene.words]) + "."


def _noun(texts: list[str]) -> str:
    """What to call them: a single letter is no word."""
    if all(text.isdigit() for text in texts):
        return "number"
    return "word" if all(text.isalpha() and len(text) > 1 for text in texts) else "text"


READ = (
    "What does it say?", "Read the text.", "What is written here?", "What does the text say?", "What is written?",
    "Which text do you see?", "Can you read it?", "What is printed in the picture?", "Please read the text.",
    "Read it.",
)  # fmt: skip
_READ_ONE = {
    "word": ("What word is this?", "Read the word.", "Which word do you see?"),
    "number": ("What number is this?", "Read the number.", "Which number do you see?"),
    "text": (),
}


def read(scene: Scene, random: Random) -> Turn | None:
    """What is written."""
    texts = [word.text for word in scene.words]
    own = _READ_ONE[_noun(texts)] if len(texts) == 1 else ()
    return Turn("read", random.choice(own if own and random.random() < 0.25 else READ), reading(scene))


LETTERS = (
    "What color are the letters?", "What color is the text?", "In which color is it written?",
    "What color is the writing?",
)  # fmt: skip


def letters(scene: Scene, random: Random) -> Turn | None:
    """A word's color."""
    if len(scene.words) != 1:
        return None
    return Turn("color", random.choice(LETTERS), f"The text is {scene.words[0].colour}.")


def count_words(scene: Scene, random: Random) -> Turn | None:
    """How many words, numbers or texts there are."""
    return count_turn("count", _noun([word.text for word in scene.words]), len(scene.words), random)


def says(scene: Scene, random: Random) -> Turn | None:
    """Whether a text is there, or one that differs in a letter."""
    texts = [word.text for word in scene.words]
    text = random.choice(texts)
    claimed = text
    if random.random() < 0.5:
        i = random.randrange(len(text))
        letters = "0123456789" if text.isdigit() else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        claimed = text[:i] + random.choice(letters) + text[i + 1 :]
    if any(claimed in text and claimed != text for text in texts):
        return None  # part of a text
    return Turn("yes/no", ask_whether_it_says(claimed, random), "Yes." if claimed in texts else "No.")


def ask_whether_it_says(text: str, random: Random) -> str:
    """A question that quotes a text."""
    form = random.choice(('Does it say "{}"?', 'Is "{}" written there?', f'Do you see the {_noun([text])} "{{}}"?'))
    return form.format(text)


def extreme(scene: Scene, chosen: Callable[..., Bar]) -> Bar:
    """The tallest or the shortest bar: `max` or `min` of them."""
    return chosen(scene.bars, key=lambda bar: bar.height)


def tallest(scene: Scene, random: Random) -> Turn | None:
    """Which bar is the tallest or shortest, or its color."""
    words = random.choice(
        ((max, "tallest"), (max, "highest"), (max, "largest"), (min, "shortest"), (min, "lowest"), (min, "smallest"))
    )
    bar = extreme(scene, words[0])
    if random.random() < 0.3:
        form = random.choice(("What color is the {} bar?", "Which color does the {} bar have?"))
        return Turn("chart", form.format(words[1]), f"The {words[1]} bar is {bar.colour}.")
    form = random.choice(
        ("Which bar is the {}?", "What is the {} bar?", "Which one is the {} bar?", "Name the {} bar.")
    )
    return Turn("chart", form.format(words[1]), f"Bar {bar.label} is the {words[1]}.")


def bar_colour(scene: Scene, random: Random) -> Turn | None:
    """The color of a bar, or the bar of a color."""
    bar = random.choice(scene.bars)
    answer = f"Bar {bar.label} is {bar.colour}."
    if random.random() < 0.5:
        form = random.choice(("What color is bar {}?", "Which color does bar {} have?", "What is the color of bar {}?"))
        return Turn("chart", form.format(bar.label), answer)
    return Turn("chart", random.choice(("Which bar is {}?", "What is the {} bar called?")).format(bar.colour), answer)


def taller(scene: Scene, random: Random) -> Turn | None:
    """Whether one bar is taller than another."""
    first, second = random.sample(scene.bars, 2)
    taller = random.random() < 0.6
    word = random.choice(("taller", "higher", "larger")) if taller else random.choice(("shorter", "lower", "smaller"))
    truth = (first.height > second.height) == taller
    return Turn("compare", f"Is bar {first.label} {word} than bar {second.label}?", "Yes." if truth else "No.")


def labels(scene: Scene, random: Random) -> Turn | None:
    """All that is written in a chart."""
    return Turn("chart", random.choice(READ), f"The bars are called {listed([bar.label for bar in scene.bars])}.")


def count_bars(scene: Scene, random: Random) -> Turn | None:
    """How many bars there are."""
    return count_turn("chart", "bar", len(scene.bars), random)
