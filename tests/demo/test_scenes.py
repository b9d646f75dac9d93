"""Pictures and questions: the same for the same seed, and true."""

import itertools
import re
from random import Random

import pytest
import torch
from PIL import ImageChops

from demo.batches import Examples
from demo.checkpoint import preprocessor_config
from demo.dialogue import build_tokenizer, tokenize
from demo.drawing import lies_below
from demo.lexicon import printed_text
from demo.make_samples import SAMPLES
from demo.phrases import TOPICS
from demo.questions import ask, ask_about, description
from demo.scenes import conversation, make_example, make_scene
from demo.talk import aside
from demo.tokenizer import BOS_ID, EOS_ID
from demo.train import SPEC, attention_mask
from demo.world import PLACES, Scene, Shape, Word
from engine.image_processor import ImageProcessor


def shape(kind: str, colour: str, place: int) -> Shape:
    return Shape(kind, colour, "large", place, 0.5, 0.5, 0.15, 0.0)


def printed(text: str) -> Word:
    return Word(text, "black", 0, 0.5, 0.5, 0.8, 0.3, 0.0)


SCENE = Scene("white", [shape("circle", "red", 0), shape("star", "blue", 4), shape("star", "green", 8)])
WORD = Scene("white", words=[printed("HELLO")])
CHART = SAMPLES["chart.jpg"][0]


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


def asked(scene: Scene) -> dict[str, set[str]]:
    """Each question of many, and the answers that were given to it."""
    found: dict[str, set[str]] = {}
    for seed in range(10_000):
        turn = ask(scene, Random(seed))
        found.setdefault(turn.question, set()).add(turn.answer)
    return found


@pytest.mark.parametrize(
    ("topic", "question", "answer"),
    [
        ("color", "the circle", "It is red."),
        ("color", "background", "The background is white."),
        ("place", "the circle", f"It is {PLACES[0]}."),
        ("count", "(many|the|of) stars", "There are two stars."),
        ("count", "blue stars", "There is one blue star."),
        ("count", "(many|the|of) circles", "There is one circle."),
        ("count", "(many|the|of) shapes", "There are three shapes."),
        ("honest", "the heart", "There are no hearts."),
        ("honest", "the star", "There are two stars."),
        ("yes/no", "a blue star", "Yes."),
        ("yes/no", "a blue circle", "No."),
    ],
)
def test_answers_are_true(topic: str, question: str, answer: str) -> None:
    turns = [ask_about(topic, SCENE, Random(seed)) for seed in range(1500)]
    assert {turn.answer for turn in turns if turn and re.search(rf"\b{question}\b", turn.question)} == {answer}


@pytest.mark.parametrize(
    ("scene", "question", "answer"),
    [
        (WORD, "How many shapes are there?", "There are no shapes."),
        (WORD, "Which bar is the tallest?", "There is no chart."),
        (CHART, "How many shapes are there?", "There are no shapes."),
        (CHART, "How many words are there?", "There are no words."),
        (CHART, "What does it say?", "The bars are called A, B, C and D."),
        (SCENE, "Which bar is the tallest?", "There is no chart."),
        (SCENE, "What does it say?", "There is no text."),
        (SCENE, "How many words are there?", "There are no words."),
        (Scene("white"), "What color is the background?", "The background is white."),
    ],
)
def test_what_is_not_there_is_not_invented(scene: Scene, question: str, answer: str) -> None:
    assert asked(scene)[question] == {answer}


def test_a_side_of_which_a_corner_is_taken_names_nothing() -> None:
    star, circle = shape("star", "blue", 1), shape("circle", "red", 0)
    by_side = re.compile(r"(What|anything).* at the top\?|the shape at the top(?! left| right)|circle at the top\?")
    assert any(by_side.search(question) for question in asked(Scene("white", [star])))
    assert not any(by_side.search(question) for question in asked(Scene("white", [circle, star])))
    assert not any(by_side.search(question) for question in asked(Scene("white", [circle])))


@pytest.mark.parametrize(
    ("texts", "noun"),
    [(["HELLO"], "word"), (["K"], "text"), (["42"], "number"), (["HELLO", "SUN"], "word"), (["UP", "7"], "text")],
)
def test_a_number_is_not_called_a_word(texts: list[str], noun: str) -> None:
    scene = Scene("white", words=[printed(text) for text in texts])
    named = re.compile(r"(?:[Ww]hat|[Ww]hich|Read the|many) (word|number|text)s?(?: is this| do you see| are there|\.)")
    found = {name for question in asked(scene) for name in named.findall(question)}
    assert found == {noun, "text"}  # "Read the text." suits all


def test_a_property_is_not_asked_for_again_at_once() -> None:
    for seed in range(400):
        for last, turn in itertools.pairwise(conversation(SCENE, Random(seed), 6)):
            if turn.topic.startswith("follow-up") and turn.about is last.about:
                assert turn.topic.removeprefix("follow-up ") != last.topic.removeprefix("follow-up ")


def test_words_are_not_drawn_over_their_own_colour() -> None:
    random, size = Random(0), (400, 300)
    scenes = [make_scene(random, size, "words and shapes") for _ in range(300)]
    pairs = [(shape, word) for scene in scenes for shape in scene.shapes for word in scene.words]
    below = [(shape, word) for shape, word in pairs if lies_below(shape, word, size)]
    assert len(below) > 50
    assert not any(shape.colour == word.colour for shape, word in below)


def test_no_text_is_an_o_or_a_zero_alone() -> None:
    random = Random(0)
    assert not {"O", "0"} & {printed_text(random) for _ in range(20_000)}


def test_what_is_said_beside_a_picture_is_not_about_it() -> None:
    beside = {aside(Random(seed)).question for seed in range(3000)}
    assert "What can you do?" in beside
    assert not beside & {turn.question for seed in range(300) if (turn := ask_about("describe", SCENE, Random(seed)))}


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
