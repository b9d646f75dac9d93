"""Training batches: pictures prepared as the server prepares them, conversations as its template writes them."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from demo.dialogue import tokenize
from demo.drawing import Labels
from demo.phrases import TOPICS, Turn
from demo.scenes import chat, conversation, make_example
from demo.tokenizer import IMAGE, PAD
from engine.image_processor import ImageProcessor

TEXT_TOKENS = 236
"""Of a row at most, its image's tokens not counted."""
LOOKS = 2
"""At each picture, each with other conversations, since drawing takes longer than looking."""
NUM_CHATS = 8
"""Rows without a picture in a batch."""
_TURNS = 16
"""Of a row's conversations together."""
_LENGTHS, _SHARES = (1, 2, 3), (0.75, 0.15, 0.1)
"""Turns of a conversation."""
_PHOTOS = ("astronaut.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png", "grass.png",
           "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
           "rocket.jpg", "brick.png", "cell.png", "page.png", "text.png")  # fmt: skip


_Row = tuple[npt.NDArray[Any], ...]
"""The arrays of `Rows` for one row."""


class Rows(NamedTuple):
    """Tensors of `R` rows of tokens: a picture and several conversations about it, or only conversations."""

    ids: Tensor
    """(R, tokens) int16; an image's placeholder stands as often as an image has tokens."""
    positions: Tensor
    """(R, tokens) int16; each conversation's follow those of the row's beginning."""
    talks: Tensor
    """(R, tokens) int8 number of the conversation; 0 for the beginning that all share."""
    turns: Tensor
    """(R, tokens) int8 number of the turn whose answer a token belongs to; -1 for none."""
    topics: Tensor
    """(R, turns) int8 index into `TOPICS`."""
    answers: Tensor
    """(A) int64 indices, into all R * tokens, of answers' tokens. The host knows them, lest it wait for the GPU."""
    images: Tensor
    """(I) int64 the same of images' placeholders."""


class Batch(NamedTuple):
    """`P` pictures with `LOOKS` rows about each, and rows without one."""

    pixels: Tensor
    """(P, side, side, 3) uint8."""
    patches: Tensor
    """(P, 2, patches) uint8 class and colour of what each patch shows at its centre."""
    looks: list[Rows]
    chats: Rows


class Examples(Dataset[Batch]):
    """Batch number `i` of a seed, of `size` pictures; made in worker processes."""

    def __init__(
        self, seed: int, size: int, num_batches: int, tokenizer: Tokenizer, processor: ImageProcessor, patch: int
    ) -> None:
        self._seed = seed
        self._size = size
        self._num_batches = num_batches
        self._tokenizer = tokenizer
        self._processor = processor
        self._patch = patch
        self._photos = load_photos()
        image = tokenizer.token_to_id(IMAGE)
        if image is None:
            raise ValueError(f"the tokenizer has no {IMAGE}")
        self._image = image

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, number: int) -> Batch:
        if number >= self._num_batches:
            raise IndexError(number)
        pixels, patches = [], []
        looks: list[list[_Row]] = [[] for _ in range(LOOKS)]
        for index in range(number * self._size, (number + 1) * self._size):
            random = Random(f"{self._seed}/{index}/text")
            longest = 2000 if random.random() < 0.02 else 440
            example = make_example(self._seed, index, longest=longest, photos=self._photos)
            pixels.append(self._processor.prepare(example.image))
            patches.append(_patch_labels(example.labels, self._processor.output_shape[1], self._patch))
            for rows in looks:
                talks = [conversation(example.scene, random, length) for length in _lengths(random)]
                rows.append(self._row(talks, random, with_image=True))
        random = Random(f"{self._seed}/{number}/chat")
        chats = [
            self._row([chat(random, length) for length in _lengths(random)], random, with_image=False)
            for _ in range(NUM_CHATS)
        ]
        return Batch(_stack(pixels), _stack(patches), [self._rows(rows) for rows in looks], self._rows(chats))

    def _row(self, talks: list[list[Turn]], random: Random, *, with_image: bool) -> _Row:
        tokens = tokenize(self._tokenizer, talks, with_image=with_image, most_tokens=TEXT_TOKENS, random=random)
        patches = (self._processor.output_shape[1] // self._patch) ** 2
        widths = np.where(np.array(tokens.ids) == self._image, patches, 1)
        length = TEXT_TOKENS + patches
        ids = _padded(np.repeat(tokens.ids, widths), length, self._tokenizer.token_to_id(PAD), np.int16)
        # What is behind the conversations sees no more of them than they see of each other.
        talk_of = _padded(np.repeat(tokens.talk, widths), length, _TURNS + 1, np.int8)
        turn_of = _padded(np.repeat(tokens.turn, widths), length, -1, np.int8)
        topics = [TOPICS.index(turn.topic.removeprefix("follow-up ")) for turns in talks for turn in turns]
        return ids, _positions(talk_of), talk_of, turn_of, np.array(topics, np.int8)

    def _rows(self, rows: list[_Row]) -> Rows:
        ids, positions, talks, turns, topics = (_stack(list(column)) for column in zip(*rows, strict=True))
        is_image = torch.eq(ids.flatten(), self._image)
        answers, images = ((turns.flatten() >= 0).nonzero().flatten(), is_image.nonzero().flatten())
        return Rows(ids, positions, talks, turns, topics, answers, images)


def _lengths(random: Random) -> list[int]:
    """Turns of each conversation of a row."""
    lengths: list[int] = []
    while (left := _TURNS - sum(lengths)) > 0:
        lengths.append(min(left, random.choices(_LENGTHS, _SHARES)[0]))
    return lengths


def _padded(values: npt.NDArray[Any], length: int, padding: Any, dtype: Any) -> npt.NDArray[Any]:
    padded: npt.NDArray[Any] = np.full(length, padding, dtype)
    padded[: len(values)] = values
    return padded


def _positions(talk_of: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Counted on from the beginning's in each conversation."""
    indices = np.arange(len(talk_of))
    starts = np.maximum.accumulate(np.where(np.diff(talk_of, prepend=0) != 0, indices, 0))
    return (indices - starts + np.where(starts > 0, starts[starts > 0].min(), 0)).astype(np.int16)


def _stack(arrays: list[npt.NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def join(parts: Sequence[Rows]) -> Rows:
    """Rows behind each other."""
    tokens = parts[0].ids.shape[1]
    before = [sum(len(part.ids) for part in parts[:i]) * tokens for i in range(len(parts))]
    ids, positions, talks, turns, topics = (torch.cat([part[i] for part in parts]) for i in range(5))
    answers = torch.cat([part.answers + offset for part, offset in zip(parts, before, strict=True)])
    images = torch.cat([part.images + offset for part, offset in zip(parts, before, strict=True)])
    return Rows(ids, positions, talks, turns, topics, answers, images)


def load_photos() -> tuple[Image.Image, ...]:
    """The photographs that scikit-image ships."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("training takes scikit-image's photographs: pip install '.[train]'")
    folder = Path(spec.origin).parent / "data"
    return tuple(Image.open(folder / name).convert("RGB") for name in _PHOTOS)


def _patch_labels(labels: Labels, side: int, patch: int) -> npt.NDArray[np.uint8]:
    """(2, patches) what is at each patch's centre, in a picture that was padded to a square and scaled to `side`."""
    width, height = labels.canvas.size
    centres = (np.arange(side // patch) + 0.5) * patch / side * max(width, height)
    rows = np.floor(centres - (max(width, height) - height) // 2).astype(int)
    columns = np.floor(centres - (max(width, height) - width) // 2).astype(int)
    found = labels.at(*np.meshgrid(rows, columns, indexing="ij"))
    return found.reshape(2, -1)
