"""Questions about printed words and about bar charts."""

from collections.abc import Callable
from random import Random

from demo.phrases import Turn, count_turn, listed
from demo.world import Bar, Scene


def reading(scene: Scene) -> str:
    """All that is written."""
    return "It says " + listed([f'"{word.text}"' for word in scene.words]) + "."


def read(scene: Scene, random: Random) -> Turn | None:
    """What is written."""
    forms = ("What does it say?", "Read the text.", "What is written here?", "What does the text say?",
             "What is written?", "Which text do you see?", "What word is this?", "Can you read it?",
             "What is printed in the picture?", "Please read the text.", "What number is this?", "Read the number.",
             "Read it.")  # fmt: skip
    return Turn("read", random.choice(forms), reading(scene) if scene.words else "There is no text.")


def read_or_not(scene: Scene, random: Random) -> Turn | None:
    """What is written; now and then also where nothing is."""
    return read(scene, random) if scene.words or random.random() < 0.3 else None


def letters(scene: Scene, random: Random) -> Turn | None:
    """A word's color."""
    if len(scene.words) != 1:
        return None
    forms = ("What color are the letters?", "What color is the text?", "In which color is it written?",
             "What color is the writing?")  # fmt: skip
    return Turn("color", random.choice(forms), f"The text is {scene.words[0].colour}.")


def count_words(scene: Scene, random: Random) -> Turn | None:
    """How many words there are."""
    return count_turn("count", "word", len(scene.words), random)


def says(scene: Scene, random: Random) -> Turn | None:
    """Whether a word is there, or one that differs in a letter."""
    text = scene.words[0].text
    claimed = text
    if random.random() < 0.5:
        i = random.randrange(len(text))
        letters = "0123456789" if text.isdigit() else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        claimed = text[:i] + random.choice(letters) + text[i + 1 :]
    truth = any(word.text == claimed for word in scene.words)
    form = random.choice(('Does it say "{}"?', 'Is "{}" written there?', 'Do you see the word "{}"?'))
    return Turn("yes/no", form.format(claimed), "Yes." if truth else "No.")


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


def count_bars(scene: Scene, random: Random) -> Turn | None:
    """How many bars there are."""
    return count_turn("chart", "bar", len(scene.bars), random)
