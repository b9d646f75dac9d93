"""Conversations as text and tokens, the way the chat template writes them."""

import re
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from tokenizers import Tokenizer

from demo.lexicon import WORDS
from demo.questions import Turn
from demo.scenes import conversation, make_scene
from demo.talk import all_texts
from demo.tokenizer import BOS, EOS, IMAGE, train_tokenizer

PHRASES = ("USER:", "ASSISTANT:")
BASE_VOCAB = 2100
VOCAB_SIZE = 2112


_OPENINGS = ("Please tell me: ", "Tell me, ", "Hey, ", "Look at this. ", "Now: ", "OK. ")
_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant that describes pictures.", "Answer briefly.",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.", "Be concise.", "You answer questions about images.",
)  # fmt: skip


class Tokens(NamedTuple):
    """A conversation's token ids, and for each the number of the turn whose answer it belongs to; -1 for none."""

    ids: list[int]
    turn: list[int]


def build_tokenizer() -> Tokenizer:
    """The demo model's tokenizer. What is printed in pictures is not among its texts, lest capitals be joined."""
    texts = (re.sub(r'"\w+"|\b[A-Z]{2,}\b', '""', text) for text in _texts(Random(0)))
    return train_tokenizer(texts, BASE_VOCAB, PHRASES)


def _texts(random: Random) -> Iterator[str]:
    yield from all_texts()
    yield from (text for word in WORDS for text in (word.lower(), word.capitalize()))
    for _ in range(3000):
        for turn in conversation(make_scene(random, (400, 300)), random, 4):
            yield turn.question
            yield turn.answer


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


def tokenize(tokenizer: Tokenizer, turns: list[Turn], *, with_image: bool, most_tokens: int, random: Random) -> Tokens:
    """As many turns as fit `most_tokens`, one token for the image counted in."""
    text, spans = BOS + _system(random), []
    for number, turn in enumerate(turns):
        head = f"{IMAGE}\n" if with_image and number == 0 else ""
        text += f"USER: {head}{as_spoken(turn.question, random)} ASSISTANT:"
        start = len(text)
        text += f" {turn.answer}{EOS}"
        spans.append((start, len(text)))
    encoded = tokenizer.encode(text, add_special_tokens=False)
    ids, turn_of = encoded.ids, [-1] * len(encoded.ids)
    whole = 0
    for number, (start, end) in enumerate(spans):
        inside = [
            i for i, (first, last) in enumerate(encoded.offsets) if start <= first and last <= end and first < last
        ]
        if inside[-1] >= most_tokens:
            break
        for i in inside:
            turn_of[i] = number
        whole = inside[-1] + 1
    return Tokens(ids[:whole], turn_of[:whole])
