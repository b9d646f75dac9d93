"""Pictures and questions: the same for the same seed, and true."""

from random import Random

import pytest
from PIL import ImageChops

from demo.dialogue import build_tokenizer, tokenize
from demo.questions import TOPICS, ask_about, description
from demo.scenes import make_example, make_scene
from demo.tokenizer import BOS_ID, EOS_ID
from demo.world import PLACES, Scene, Shape


def shape(kind: str, colour: str, place: int) -> Shape:
    return Shape(kind, colour, "large", place, 0.5, 0.5, 0.15, 0.0)


SCENE = Scene("white", [shape("circle", "red", 0), shape("star", "blue", 4), shape("star", "green", 8)])


def test_a_seed_gives_the_same_example() -> None:
    for index in range(12):
        one, other = (make_example(5, index, num_turns=4, longest=400) for _ in range(2))
        assert one.turns == other.turns
        assert ImageChops.difference(one.image, other.image).getbbox() is None
    assert make_example(6, 0, longest=400).scene != make_example(5, 0, longest=400).scene


def test_sizes_and_proportions() -> None:
    for index in range(60):
        width, height = make_example(7, index, num_turns=0).image.size
        assert 100 <= min(width, height) <= max(width, height) <= 2000
        assert max(width, height) <= 3.1 * min(width, height)


@pytest.mark.parametrize(
    ("topic", "question", "answer"),
    [
        ("color", "circle", "It is red."),
        ("place", "circle", f"It is {PLACES[0]}."),
        ("count", "stars", "There are two stars."),
        ("count", "circles", "There is one circle."),
        ("count", " shapes", "There are three shapes."),
        ("honest", "heart", "There are no hearts."),
        ("yes/no", "a blue star", "Yes."),
        ("yes/no", "a blue circle", "No."),
    ],
)
def test_answers_are_true(topic: str, question: str, answer: str) -> None:
    turns = [ask_about(topic, SCENE, Random(seed)) for seed in range(1500)]
    found = {
        turn.answer
        for turn in turns
        if turn is not None and question in turn.question and not any(c in turn.question for c in ("green", "large"))
    }
    assert answer in found
    assert topic in ("yes/no", "count", "color") or found == {answer}


def test_description() -> None:
    assert description(SCENE) == (
        "There are three shapes: a large red circle at the top left, a large blue star in the center and a large green "
        "star at the bottom right."
    )


def test_every_kind_of_picture_can_be_asked_about() -> None:
    random = Random(0)
    topics = {
        turn.topic.removeprefix("follow-up ") for i in range(80) for turn in make_example(8, i, num_turns=6).turns
    }
    assert topics == set(TOPICS)
    assert make_scene(random, (300, 200), "blank").is_blank


def test_answers_are_marked_among_the_tokens() -> None:
    tokenizer = build_tokenizer()
    example = make_example(9, 0, feature="shapes", num_turns=3, longest=300)
    tokens = tokenize(tokenizer, example.turns, with_image=True, most_tokens=200, random=Random(1))
    assert tokens.ids[0] == BOS_ID and len(tokens.ids) == len(tokens.turn)
    for number, turn in enumerate(example.turns):
        ids = [token for token, mine in zip(tokens.ids, tokens.turn, strict=True) if mine == number]
        assert ids[-1] == EOS_ID
        assert tokenizer.decode(ids).strip() == turn.answer
