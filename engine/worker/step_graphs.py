"""The language model's part of any step as a CUDA graph: for numbers of tokens, whatever requests they belong to."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.worker.cuda_graphs import GraphedFunction
from engine.worker.input_batch import InputBatch, StepLayout, columns

_MOST_TOKENS = 4096
"""Larger steps keep the GPU busy for so long that launching their kernels one by one costs nothing."""

_COUNTS, _SHARED = 2, 3
"""Numbers at the head of what tells a step's graph how the step is cut."""

Forward = Callable[[Tensor, AttentionMetadata], Tensor]


class StepGraphs:
    """What a step needs beside its tokens lies in tensors that the graphs read: embeddings, and how it is cut.

    Args:
        forward: embeddings (T, hidden) and metadata to states (T, hidden).
        batch: whose slots the tokens are of.
        hidden_size: of the embeddings.
        dtype: of the embeddings.
        max_tokens: of a step.
        max_requests: of a step.
        tile_tokens: tokens of a tile.
    """

    def __init__(
        self,
        forward: Forward,
        batch: InputBatch,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        max_tokens: int,
        max_requests: int,
        tile_tokens: int,
    ) -> None:
        self._forward = forward
        self._batch = batch
        sizes = step_sizes(max_tokens)
        most = sizes[-1]
        device = batch.device
        self._max_requests = max_requests
        self._hidden = torch.zeros(most, hidden_size, dtype=dtype, device=device)
        self._states = torch.zeros_like(self._hidden)
        # Counts, what is shared, prefills, tiles: all that a step changes goes there in one copy.
        max_tiles = most // tile_tokens + max_requests
        self._cut = torch.zeros(_COUNTS + _SHARED + 4 * max_requests + 2 * max_tiles, dtype=torch.int32, device=device)
        padding = torch.tensor([batch.padding_slot, 0, 0], dtype=torch.int32, device=device)
        self._graphed = GraphedFunction(self._run, padding.repeat(most, 1), sizes)

    def capture(self, pool: Any) -> None:
        """Capture every size."""
        self._graphed.capture(pool, "steps")

    def padded_size(self, layout: StepLayout) -> int | None:
        """Tokens of the graph that a step fits; None if none does."""
        return self._graphed.padded_size(len(layout.tokens))

    def __call__(self, layout: StepLayout, tokens: Tensor, hidden: Tensor) -> Tensor:
        """States (padded size, hidden) of embeddings of that shape; they last until the next call.

        Args:
            layout: of the step.
            tokens: (padded size, 3) its tokens and padding, on the device.
            hidden: their embeddings.
        """
        prefills, tiles = self._batch.cut(layout)
        packed = np.zeros(self._cut.shape[0], np.int32)
        packed[: _COUNTS + _SHARED] = layout.num_decodes, tiles.shape[1], *layout.shared
        _, _, to_prefills, to_tiles = self._split(packed)
        to_prefills[:, : prefills.shape[1]] = prefills
        to_tiles[:, : tiles.shape[1]] = tiles
        self._cut.copy_(self._batch.upload(packed), non_blocking=True)
        self._hidden[: len(hidden)] = hidden
        return self._graphed(tokens)  # type: ignore[no-any-return]

    def _split(self, packed: Any) -> Any:
        """Counts (2), shared (3), prefills (4, requests) and tiles (2, tiles) of the packed array or tensor."""
        head = _COUNTS + _SHARED
        end = head + 4 * self._max_requests
        return packed[:_COUNTS], packed[_COUNTS:head], packed[head:end].reshape(4, -1), packed[end:].reshape(2, -1)

    def _run(self, tokens: Tensor) -> Tensor:
        size = len(tokens)
        counts, shared, prefills, tiles = self._split(self._cut)
        token_rows, positions, rotary_rows = columns(tokens)
        metadata = AttentionMetadata(
            num_decodes=min(size, self._max_requests),
            query_start=[],
            seq_lens=[],
            rows=[],
            token_rows=token_rows,
            positions=positions,
            rotary_rows=rotary_rows,
            block_table=self._batch.block_table,
            prefills=prefills,
            tiles=tiles,
            counts=counts,
            shared=shared if self._batch.finds_shared else None,
        )
        # To a place that all sizes share: what a graph returns keeps its memory for ever.
        return self._states[:size].copy_(self._forward(self._hidden[:size], metadata))


def step_sizes(max_tokens: int) -> list[int]:
    """Numbers of tokens to capture: multiples of what a matrix product rounds up to anyway."""
    most = min(max_tokens, _MOST_TOKENS)
    sizes = [16, 32, 64, *range(128, 1024, 128), *range(1024, most, 256)]
    return [size for size in sizes if size < most] + [most]
