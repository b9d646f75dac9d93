"""Conversations as text and tokens, the way the chat template writes them."""

import re
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from tokenizers import Tokenizer

from demo.lexicon import WORDS
from demo.phrases import Turn
from demo.scenes import conversation, make_scene
from demo.talk import all_texts
from demo.tokenizer import BOS, EOS, IMAGE, train_tokenizer

ANSWERER = "ASSISTANT:"
PHRASES = ("USER:", ANSWERER)
BASE_VOCAB = 2100
VOCAB_SIZE = 2112

_OPENINGS = ("Please tell me: ", "Tell me, ", "Hey, ", "Look at this. ", "Now: ", "OK. ")
_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant that describes pictures.", "Answer briefly.",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.", "Be concise.", "You answer questions about images.",
)  # fmt: skip


class Tokens(NamedTuple):
    """Several conversations behind one beginning, its image included, that all of them share.

    Each is to be read as if it alone followed the beginning.
    """

    ids: list[int]
    talk: list[int]
    """For each token the number of its conversation, from 1; 0 for the beginning."""
    turn: list[int]
    """For each token the number, from 0 over all conversations, of the turn whose answer it belongs to; -1 for none."""


def build_tokenizer() -> Tokenizer:
    """The demo model's tokenizer. What is printed in pictures is not among its texts, lest capitals be joined."""
    texts = (text if _is_data(text) else re.sub(r'"\w+"|\b[A-Z]{2,}\b', '""', text) for text in _texts(Random(0)))
    return train_tokenizer(texts, BASE_VOCAB, PHRASES)


def _texts(random: Random) -> Iterator[str]:
    yield from all_texts()
    yield from (text for word in WORDS for text in (word.lower(), word.capitalize()))
    for _ in range(3000):
        for turn in conversation(make_scene(random, (400, 300)), random, 4):
            yield turn.question
            yield turn.answer


def _is_data(answer: str) -> bool:
    """Whether it is JSON, which begins without the space that other answers begin with."""
    return answer.startswith("{")


def as_spoken(question: str, random: Random) -> str:
    """A question as people type it: perhaps in small letters, without its last mark, or with some words before it."""
    if random.random() < 0.12:
        question = random.choice(_OPENINGS) + question
    if random.random() < 0.15 and '"' not in question:
        question = question.lower()
    if random.random() < 0.15:
        question = question.rstrip("?.!")
    return question


def _system(random: Random) -> str:
    """What some clients send before the conversation."""
    if random.random() > 0.1:
        return ""
    return random.choice(_SYSTEM) + " "


def tokenize(
    tokenizer: Tokenizer, talks: list[list[Turn]], *, with_image: bool, most_tokens: int, random: Random
) -> Tokens:
    """As many conversations as fit `most_tokens`, one token for the image counted in."""
    head = BOS + _system(random) + (f"USER: {IMAGE}" if with_image else "")
    beginning = tokenizer.encode(head, add_special_tokens=False).ids
    result = Tokens(list(beginning), [0] * len(beginning), [-1] * len(beginning))
    first_turn = 0
    for number, turns in enumerate(talks, 1):
        ids = tokenizer.encode(head + _written(turns, random, with_image), add_special_tokens=False).ids
        assert ids[: len(beginning)] == beginning
        ids = ids[len(beginning) :]
        if len(result.ids) + len(ids) > most_tokens:
            break
        result.ids.extend(ids)
        result.talk.extend([number] * len(ids))
        result.turn.extend(_turn_numbers(tokenizer, ids, first_turn))
        first_turn += len(turns)
    return result


def _written(turns: list[Turn], random: Random, with_image: bool) -> str:
    texts = [
        f"{as_spoken(turn.question, random)} {ANSWERER}{'' if _is_data(turn.answer) else ' '}{turn.answer}{EOS}"
        for turn in turns
    ]
    return ("\n" if with_image else "USER: ") + "USER: ".join(texts)


def _turn_numbers(tokenizer: Tokenizer, ids: list[int], first: int) -> list[int]:
    """An answer goes from behind "ASSISTANT:" up to the token that ends it."""
    begins, ends = tokenizer.token_to_id(ANSWERER), tokenizer.token_to_id(EOS)
    numbers, number, inside = [], first - 1, False
    for token in ids:
        numbers.append(number if inside else -1)
        if token == begins:
            number, inside = number + 1, True
        elif token == ends:
            inside = False
    return numbers
