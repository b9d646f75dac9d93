"""Steps in which every request has one token, whole as CUDA graphs: from token ids to token ids."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.models.llama import LlamaForCausalLM
from engine.worker.cuda_graphs import GraphedFunction
from engine.worker.input_batch import InputBatch, StepLayout, columns
from engine.worker.shared_prefix import LEAST_MEMBERS


class DecodeGraphs:
    """Captured for several numbers of requests; once more for those among which some share a beginning.

    Args:
        model: whose steps they are.
        batch: whose slots the requests have.
        caches: the layers'.
        max_requests: of a step.
        finds_shared: whether shared beginnings are looked for.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        batch: InputBatch,
        caches: list[Tensor],
        *,
        max_requests: int,
        finds_shared: bool,
    ) -> None:
        self._model = model
        self._batch = batch
        self._caches = caches
        vocab_size = model.config.vocab_size
        self._logits = torch.empty(max_requests, vocab_size, dtype=torch.float32, device=batch.device)
        padding = torch.tensor([batch.padding_slot, 0, 0], dtype=torch.int32, device=batch.device)
        inputs = padding.repeat(max_requests, 1)
        sizes = decode_sizes(max_requests)
        self._plain = GraphedFunction(partial(self._run, None), inputs, sizes)
        self._shared = torch.zeros(3, dtype=torch.int32, device=batch.device)
        sharing = [size for size in sizes if size >= LEAST_MEMBERS and finds_shared]
        self._sharing = GraphedFunction(partial(self._run, self._shared), inputs, sharing)

    def capture(self, pool: Any) -> None:
        """Capture every size."""
        self._plain.capture(pool, "decoding")
        self._sharing.capture(pool, "decoding of shared prefixes")

    def fits(self, layout: StepLayout) -> bool:
        """Whether a step is of this kind, and not too large."""
        return layout.only_decodes and self._plain.padded_size(len(layout.parts)) is not None

    def __call__(self, layout: StepLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Run a step that fits; all three last until the next call.

        Returns:
            slot and index of each request's token (R, 3), logits (R, vocabulary) float32, and the likeliest tokens
            (R), which are already written behind those that were read.
        """
        count = len(layout.parts)
        graphed = self._plain
        if layout.shared[0]:
            graphed = self._sharing
            self._shared.copy_(self._batch.upload_ints(layout.shared), non_blocking=True)
        size = graphed.padded_size(count)
        assert size is not None
        rows = self._batch.upload(self._batch.padded(layout, size))
        logits, tokens = graphed(rows)
        return rows[:count], logits[:count], tokens[:count]

    def _run(self, shared: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        token_rows, positions, rotary_rows = columns(rows)
        size, none = len(rows), rows[:0].T
        metadata = AttentionMetadata(
            num_decodes=size,
            query_start=[],
            seq_lens=[],
            rows=[],
            token_rows=token_rows,
            positions=positions,
            rotary_rows=rotary_rows,
            block_table=self._batch.block_table,
            prefills=none,
            tiles=none,
            shared=shared,
        )
        embedded = self._model.language_model.embed_tokens(self._batch.token_table[token_rows, positions])
        hidden = self._model.language_model(embedded, self._caches, metadata)
        logits = self._logits[:size].copy_(self._model.head(hidden))
        tokens = logits.argmax(-1)
        self._batch.write_sampled(token_rows, positions + 1, tokens)
        return logits, tokens


def decode_sizes(most: int) -> list[int]:
    """Numbers of requests to capture: the gaps grow with the number, so that padding costs little."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most, 16)]
    return [size for size in sizes if size < most] + [most]
