"""Training batches: pictures prepared as the server prepares them, conversations as its template writes them."""

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
from demo.questions import TOPICS, Turn
from demo.scenes import chat, conversation, make_example
from demo.tokenizer import IMAGE, PAD
from engine.image_processor import ImageProcessor

TEXT_TOKENS = 240
"""Of a conversation at most, its image's tokens not counted."""
CONVERSATIONS = 2
"""About each picture: it is looked at twice, since drawing takes longer than looking."""
NUM_CHATS = 8
"""Conversations without a picture in a batch."""
_TURNS = 16
_PHOTOS = ("astronaut.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png", "grass.png",
           "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
           "rocket.jpg", "brick.png", "cell.png", "page.png", "text.png")  # fmt: skip


class Batch(NamedTuple):
    """Tensors of `P` pictures with `V` conversations about each, and of `NUM_CHATS` conversations without one."""

    pixels: Tensor
    """(P, side, side, 3) uint8."""
    patches: Tensor
    """(P, 2, patches) uint8 class and colour of what each patch shows at its centre."""
    ids: Tensor
    """(V, P, tokens) int16; an image's placeholder stands as often as an image has tokens."""
    turns: Tensor
    """(V, P, tokens) int8 number of the turn whose answer a token belongs to; -1 for none."""
    topics: Tensor
    """(V, P, turns) int8 index into `TOPICS`."""
    chat_ids: Tensor
    """(chats, tokens) as `ids`."""
    chat_turns: Tensor
    """(chats, tokens) as `turns`."""


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

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, number: int) -> Batch:
        if number >= self._num_batches:
            raise IndexError(number)
        pixels, patches, rows = [], [], []
        for index in range(number * self._size, (number + 1) * self._size):
            random = Random(f"{self._seed}/{index}/text")
            longest = 2000 if random.random() < 0.02 else 440
            example = make_example(self._seed, index, longest=longest, photos=self._photos)
            pixels.append(self._processor.prepare(example.image))
            patches.append(_patch_labels(example.labels, self._processor.output_shape[1], self._patch))
            talks = [conversation(example.scene, random, _TURNS) for _ in range(CONVERSATIONS)]
            rows.append([self._row(turns, random, with_image=True) for turns in talks])
        random = Random(f"{self._seed}/{number}/chat")
        chats = [self._row(chat(random, _TURNS), random, with_image=False) for _ in range(NUM_CHATS)]
        ids, turns, topics = (_stack([[row[i] for row in pair] for pair in rows]).transpose(0, 1) for i in range(3))
        chat_ids, chat_turns = (_stack([row[i] for row in chats]) for i in range(2))
        return Batch(_stack(pixels), _stack(patches), ids, turns, topics, chat_ids, chat_turns)

    def _row(self, turns: list[Turn], random: Random, *, with_image: bool) -> tuple[npt.NDArray[Any], ...]:
        tokens = tokenize(self._tokenizer, turns, with_image=with_image, most_tokens=TEXT_TOKENS, random=random)
        image, patches = self._tokenizer.token_to_id(IMAGE), (self._processor.output_shape[1] // self._patch) ** 2
        ids = np.full(TEXT_TOKENS + patches, self._tokenizer.token_to_id(PAD), np.int16)
        turn_of = np.full(TEXT_TOKENS + patches, -1, np.int8)
        widths = [patches if token == image else 1 for token in tokens.ids]
        ids[: sum(widths)] = np.repeat(np.array(tokens.ids, np.int16), widths)
        turn_of[: sum(widths)] = np.repeat(np.array(tokens.turn, np.int8), widths)
        topics = np.array([TOPICS.index(turn.topic.removeprefix("follow-up ")) for turn in turns], np.int8)
        return ids, turn_of, topics


def _stack(arrays: Any) -> Tensor:
    return (
        torch.from_numpy(np.stack(arrays))
        if isinstance(arrays[0], np.ndarray)
        else torch.stack([_stack(a) for a in arrays])
    )


def load_photos() -> tuple[Image.Image, ...]:
    """The photographs that scikit-image ships."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("training takes scikit-image's photographs: pip install '.[train]'")
    folder = Path(spec.origin).parent / "data"
    return tuple(Image.open(folder / name).convert("RGB") for name in _PHOTOS if (folder / name).exists())


def _patch_labels(labels: Labels, side: int, patch: int) -> npt.NDArray[np.uint8]:
    """(2, patches) what is at each patch's centre, in a picture that was padded to a square and scaled to `side`."""
    width, height = labels.canvas.size
    centres = (np.arange(side // patch) + 0.5) * patch / side * max(width, height)
    rows = np.floor(centres - (max(width, height) - height) // 2).astype(int)
    columns = np.floor(centres - (max(width, height) - width) // 2).astype(int)
    found = labels.at(*np.meshgrid(rows, columns, indexing="ij"))
    return found.reshape(2, -1)
