"""Questions about what a picture does not hold: shapes, words or bars."""

from random import Random

from demo import about_prints as prints
from demo.lexicon import printed_text
from demo.phrases import Asker, Turn, article, count_turn, plural
from demo.world import COLOURS, KINDS, Scene

_NO_CHART = "There is no chart."
_NO_TEXT = "There is no text."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def askers(scene: Scene) -> tuple[Asker, ...]:
    """Those whose things the picture does not hold."""
    found: tuple[Asker, ...] = ()
    if not scene.shapes:
        found += (_shape, _shapes)
    if not scene.words:
        found += (_words,)
    if not scene.bars:
        found += (_chart,)
    if not scene.words and not scene.bars:  # which have letters
        found += (_text, _text)
    return found


def _kind(scene: Scene, random: Random) -> str:
    """A bar may well be called a square or a rectangle."""
    return random.choice([kind for kind in KINDS if not scene.bars or kind not in ("square", "rectangle")])


def _shape(scene: Scene, random: Random) -> Turn | None:
    kind = _kind(scene, random)
    named = random.choice((kind, f"{random.choice(COLOURS)} {kind}"))
    forms = (f"Is there {article(named)}?", f"Do you see {article(named)}?", f"Can you see {article(named)}?",
             f"Are there any {plural(named)}?")  # fmt: skip
    return Turn("honest", random.choice(forms), "No.")


def _shapes(scene: Scene, random: Random) -> Turn | None:
    kind = _kind(scene, random)
    forms = (f"What color is the {kind}?", f"Where is the {kind}?", f"How big is the {kind}?")
    no_such = Turn("honest", random.choice(forms), f"There are no {plural(kind)}.")
    return random.choice((no_such, count_turn("honest", random.choice(("shape", kind)), 0, random)))


def _text(scene: Scene, random: Random) -> Turn | None:
    return Turn("honest", random.choice((*prints.READ, *prints.LETTERS)), _NO_TEXT)


def _words(scene: Scene, random: Random) -> Turn | None:
    text = printed_text(random)
    if text in [bar.label for bar in scene.bars]:
        return None
    says = Turn("honest", prints.ask_whether_it_says(text, random), "No.")
    return random.choice((says, count_turn("honest", random.choice(("word", "number")), 0, random)))


def _chart(scene: Scene, random: Random) -> Turn | None:
    first, second = random.sample(_LETTERS, 2)
    best = random.choice(("tallest", "highest", "largest", "shortest", "lowest", "smallest"))
    forms = (f"Which bar is the {best}?", f"What is the {best} bar?", f"Name the {best} bar.",
             "How many bars are there?", f"What color is the {best} bar?", f"What color is bar {first}?",
             f"Which bar is {random.choice(COLOURS)}?", f"Is bar {first} taller than bar {second}?")  # fmt: skip
    return Turn("honest", random.choice(forms), _NO_CHART)
