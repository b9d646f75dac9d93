"""Encodes images and keeps their embeddings until the scheduler lets them go."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import VisionConfig
from engine.messages import ImageInput
from engine.models.llava import LlavaForConditionalGeneration
from engine.worker.cuda_graphs import GraphedFunction
from engine.worker.input_batch import InputBatch

MAX_BATCH = 8
"""Images encoded at once."""
GRAPH_SIZES = [1, 2, 4, 8]


class VisionEncoder:
    """Embeddings by image hash, each (tokens, hidden)."""

    def __init__(self, model: LlavaForConditionalGeneration, config: VisionConfig, batch: InputBatch) -> None:
        self._model = model
        self._batch = batch
        self._input_shape = config.input_shape
        self._dtype = model.multi_modal_projector.linear_1.weight.dtype
        self._embeddings: dict[bytes, Tensor] = {}
        self._grey_levels = None if config.processor is None else _grey_levels(config).to(batch.device)
        self._graphed: GraphedFunction | None = None

    def capture(self, pool: Any) -> None:
        """Capture the encoding of uint8 pixels as CUDA graphs, if that is what comes."""
        if self._grey_levels is not None and hasattr(self._model, "vision_tower"):
            _, _, height, width = self._input_shape
            pixels = torch.zeros(MAX_BATCH, height, width, 3, dtype=torch.uint8, device=self._batch.device)
            graphed = GraphedFunction(self._encode_pixels, pixels, GRAPH_SIZES)
            graphed.capture(pool, "the vision tower")
            self._graphed = graphed

    def free(self, hashes: Iterable[bytes]) -> None:
        """Forget images."""
        for digest in hashes:
            self._embeddings.pop(digest, None)

    def encode(self, images: list[ImageInput]) -> None:
        """Encode images, several at a time."""
        for kind in ("pixels", "tensor", "features"):
            group = [image for image in images if image.kind == kind]
            for first in range(0, len(group), MAX_BATCH):
                some = group[first : first + MAX_BATCH]
                embeddings = self._encode(kind, some)
                for image, embedding in zip(some, embeddings, strict=False):  # there may be padding
                    # A copy, lest one image keep the memory of all that were encoded with it.
                    self._embeddings[image.hash] = embedding.clone()

    def merge(self, hidden: Tensor, row: int, start: int, end: int, images: list[ImageInput]) -> None:
        """Put image embeddings in place of the placeholders' in one request's part of a step.

        Args:
            hidden: (T, hidden) the step's input embeddings; changed in place.
            row: where the request's tokens begin in it.
            start: index of its first token of this step in its sequence.
            end: index behind its last one.
            images: the request's images.
        """
        for image in images:
            first, last = max(start, image.offset), min(end, image.end)
            if first < last:
                part = self._embeddings[image.hash][first - image.offset : last - image.offset]
                hidden[row + first - start : row + last - start] = part

    def profile(self) -> None:
        """Run the largest batch once, so that its memory is accounted for."""
        if hasattr(self._model, "vision_tower"):
            shape = (MAX_BATCH, *self._input_shape[1:])
            self._model.encode(torch.zeros(shape, dtype=self._dtype, device=self._batch.device))

    def _encode(self, kind: str, images: list[ImageInput]) -> Tensor:
        """Embeddings (B, tokens, hidden), of more images than these where a graph wants so."""
        wire = np.uint8 if kind == "pixels" else np.float32
        stacked = np.stack([np.frombuffer(image.data, wire).reshape(image.shape) for image in images])
        if kind == "pixels" and self._graphed is not None:
            size = self._graphed.padded_size(len(stacked))
            assert size is not None
            stacked = np.concatenate((stacked, np.zeros((size - len(stacked), *stacked.shape[1:]), wire)))
            return self._graphed(self._batch.upload(stacked))  # type: ignore[no-any-return]
        inputs = self._batch.upload(stacked)
        if kind == "pixels":
            return self._encode_pixels(inputs)
        inputs = inputs.to(self._dtype)
        return self._model.project(inputs) if kind == "features" else self._model.encode(inputs)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, height, width, 3) uint8 to embeddings (B, tokens, hidden)."""
        assert self._grey_levels is not None
        channels = torch.arange(3, device=pixels.device).view(1, 3, 1, 1)
        return self._model.encode(self._grey_levels[channels, pixels.permute(0, 3, 1, 2).int()].to(self._dtype))


def _grey_levels(config: VisionConfig) -> Tensor:
    """(3, 256) What each grey level of each channel is once rescaled and normalized, exactly as the processor does."""
    assert config.processor is not None
    levels = np.arange(256, dtype=np.uint8).reshape(256, 1, 1).repeat(3, axis=2)
    return torch.from_numpy(config.processor.normalize(levels)[:, :, 0])
