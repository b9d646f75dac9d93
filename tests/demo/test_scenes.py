"""Pictures and questions: the same for the same seed, and true."""

from random import Random

import pytest
import torch
from PIL import ImageChops

from demo.batches import Examples
from demo.checkpoint import preprocessor_config
from demo.dialogue import build_tokenizer, tokenize
from demo.phrases import TOPICS
from demo.questions import ask_about, description
from demo.scenes import make_example, make_scene
from demo.tokenizer import BOS_ID, EOS_ID
from demo.train import SPEC, attention_mask
from demo.world import PLACES, Scene, Shape
from engine.image_processor import ImageProcessor


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
    talks = [example.turns[:1], example.turns[1:]]
    tokens = tokenize(tokenizer, talks, with_image=True, most_tokens=200, random=Random(1))
    assert tokens.ids[0] == BOS_ID and len(tokens.ids) == len(tokens.turn) == len(tokens.talk)
    for number, turn in enumerate(example.turns):
        marked = [i for i, mine in enumerate(tokens.turn) if mine == number]
        assert tokens.ids[marked[-1]] == EOS_ID
        assert tokenizer.decode([tokens.ids[i] for i in marked]).strip() == turn.answer
        assert {tokens.talk[i] for i in marked} == {1 if number == 0 else 2}


def test_conversations_of_a_row_are_read_as_if_each_stood_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.batches.load_photos", tuple)
    tokenizer = build_tokenizer()
    examples = Examples(3, 2, 1, tokenizer, ImageProcessor.from_dict(preprocessor_config(SPEC)), SPEC.patch_size)
    rows = examples[0].looks[0]
    row = [tensor[0].tolist() for tensor in rows]
    ids, positions, talks = row[:3]
    count = max(talk for talk in talks if talk <= 16)
    assert count > 3
    mask = attention_mask(rows.talks[:1], torch.float32)[0, 0] == 0
    for number in range(1, count + 1):
        alone = [i for i, talk in enumerate(talks) if talk in (0, number)]
        assert [positions[i] for i in alone] == list(range(len(alone)))
        assert mask[alone[-1]].nonzero().flatten().tolist() == alone
        text = tokenizer.decode([ids[i] for i in alone if ids[i] != SPEC.image_id], skip_special_tokens=False)
        assert text.count("ASSISTANT:") == text.count("</s>") >= 1 and text.endswith("</s>")
