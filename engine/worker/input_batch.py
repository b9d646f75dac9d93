"""The requests that run, as rows of tables on the device, and one step's inputs gathered from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.messages import EngineRequest
from engine.step import NewRequest, ScheduledRequest, SchedulerOutput
from engine.worker.shared_prefix import find_shared_prefix


@dataclass(slots=True)
class Slot:
    """Where a running request's data lies."""

    index: int
    request: EngineRequest
    num_blocks: int
    images_end: int
    """Index behind the last image token; 0 without images."""


@dataclass(slots=True)
class StepLayout:
    """One step's tokens as arrays on the host: `T` tokens of `R` requests, `S` of which sample.

    Requests with one token come first, as attention wants them.
    """

    parts: list[ScheduledRequest]
    slots: list[Slot]
    tokens: npt.NDArray[np.int32]
    """(T, 3) slot, index in its sequence and row of the rotary tables of each token."""
    query_start: npt.NDArray[np.int64]
    """(R + 1) index of each request's first token among the T; the last entry is T."""
    ends: npt.NDArray[np.int64]
    """(R) index behind each request's last token in its sequence."""
    num_decodes: int
    """Requests with one token."""
    shared: tuple[int, int, int]
    """How many of them, in front, begin with the same blocks; how many tokens these hold; a slot that has them."""
    sample_rows: npt.NDArray[np.int64]
    """(S) indices into the T tokens."""
    sample_slots: npt.NDArray[np.int64]
    """(S) slots of the requests that sample."""
    sample_positions: npt.NDArray[np.int64]
    """(S) index that the sampled token will have in its sequence."""

    @property
    def only_decodes(self) -> bool:
        """Whether every request samples from its one token, which is no image's."""
        return len(self.sample_rows) == len(self.tokens) and all(
            part.start >= slot.images_end for part, slot in zip(self.parts, self.slots, strict=True)
        )


class InputBatch:
    """Slots that outlive a step: token ids and block tables stay on the device and change in place.

    Sampled ids are written where the next step reads them, so the host need not see a token before it can launch the
    step that consumes it.
    """

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        block_size: int,
        device: torch.device,
        *,
        long_start: int | None,
        tile_tokens: int = 64,
        finds_shared: bool = False,
    ) -> None:
        self.device = device
        self._tile_tokens = tile_tokens
        self.block_size = block_size
        self.max_len = max_len
        self._long_start = long_start
        max_blocks = -(-max_len // block_size)
        # The last row is nobody's: what pads a batch reads and writes there.
        self.padding_slot = num_slots
        self.token_table = torch.zeros(num_slots + 1, max_len + 1, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(num_slots + 1, max_blocks, dtype=torch.int32, device=device)
        self.finds_shared = finds_shared
        self._host_blocks = np.zeros((num_slots + 1, max_blocks), np.int32)
        self.slots: dict[str, Slot] = {}
        self._free = list(range(num_slots))[::-1]

    def remove(self, request_id: str) -> int | None:
        """Free a request's slot and return it; None for a request that never got one."""
        slot = self.slots.pop(request_id, None)
        if slot is None:
            return None
        self._free.append(slot.index)
        return slot.index

    def add(self, new: NewRequest) -> Slot:
        """Give a request a slot and write its tokens and blocks there."""
        request = new.request
        slot = Slot(self._free.pop(), request, len(new.block_ids), max((i.end for i in request.images), default=0))
        self.slots[request.request_id] = slot
        self.token_table[slot.index, : len(new.token_ids)] = self.upload(np.asarray(new.token_ids, np.int32))
        blocks = np.asarray(new.block_ids, np.int32)
        self._host_blocks[slot.index, : len(blocks)] = blocks
        self.block_table[slot.index, : len(blocks)] = self.upload(blocks)
        return slot

    def upload(self, array: npt.NDArray[np.generic]) -> Tensor:
        """Copy to the device without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def upload_ints(self, values: Sequence[int]) -> Tensor:
        """Copy a few numbers to the device, as int32."""
        return self.upload(np.array(values, np.int32))

    def lay_out(self, step: SchedulerOutput) -> StepLayout:
        """Arrange a step's tokens, and take over the blocks that it brings."""
        parts = sorted(step.requests, key=lambda part: part.num_tokens > 1)
        slots = [self.slots[part.request_id] for part in parts]
        self._append_blocks(parts, slots)
        shared = self._share(parts, slots)
        rows = np.array([slot.index for slot in slots], np.int64)
        starts = np.array([part.start for part in parts], np.int64)
        counts = np.array([part.num_tokens for part in parts], np.int64)
        samples = np.array([part.samples for part in parts], bool)
        query_start = np.concatenate(([0], np.cumsum(counts)))
        ends = starts + counts
        owner = np.repeat(np.arange(len(parts)), counts)
        positions = np.arange(len(owner)) + (starts - query_start[:-1])[owner]
        return StepLayout(
            parts=parts,
            slots=slots,
            tokens=np.stack((rows[owner], positions, self._rotary_rows(positions, slots, owner)), axis=1).astype(
                np.int32
            ),
            query_start=query_start,
            ends=ends,
            num_decodes=int((counts == 1).sum()),
            shared=shared,
            sample_rows=query_start[1:][samples] - 1,
            sample_slots=rows[samples],
            sample_positions=ends[samples],
        )

    def padded(self, layout: StepLayout, size: int) -> npt.NDArray[np.int32]:
        """A step's tokens, (size, 3), with the padding slot's behind them."""
        tokens = np.zeros((size, 3), np.int32)
        tokens[:, 0] = self.padding_slot
        tokens[: len(layout.tokens)] = layout.tokens
        return tokens

    def cut(self, layout: StepLayout) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The `prefills` and `tiles` of `AttentionMetadata`."""
        first = layout.num_decodes
        rows = layout.tokens[layout.query_start[first:-1], 0]
        counts = np.diff(layout.query_start)[first:]
        ends = layout.ends[first:]
        prefills = np.stack((layout.query_start[first:-1], counts, ends, rows)).astype(np.int32)
        return prefills, self.tiles(counts, ends)

    def tiles(self, counts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The `tiles` of `AttentionMetadata` for prefills of so many tokens, the last of which end there.

        Those that see the most keys come first, lest the GPU wait for one of them at the end.
        """
        num_tiles = -(-counts // self._tile_tokens)
        owner = np.repeat(np.arange(len(counts)), num_tiles)
        within = (np.arange(len(owner)) - (np.cumsum(num_tiles) - num_tiles)[owner]) * self._tile_tokens
        order = np.argsort(-(ends - counts)[owner] - within, kind="stable")
        return np.stack((owner, within))[:, order].astype(np.int32)

    def metadata(self, layout: StepLayout, tokens: Tensor) -> AttentionMetadata:
        """What attention must know of a step whose `tokens` (T, 3) are on the device."""
        prefills, tiles = (self.upload(array) for array in self.cut(layout))
        token_rows, positions, rotary_rows = columns(tokens)
        return AttentionMetadata(
            num_decodes=layout.num_decodes,
            query_start=layout.query_start.tolist(),
            seq_lens=layout.ends.tolist(),
            rows=layout.tokens[layout.query_start[:-1], 0].tolist(),
            token_rows=token_rows,
            positions=positions,
            rotary_rows=rotary_rows,
            block_table=self.block_table,
            prefills=prefills,
            tiles=tiles,
        )

    def write_sampled(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Put sampled ids (S) where the next step will read them: at these positions (S) of these slots (S)."""
        self.token_table[slots, positions] = tokens.int()

    def _append_blocks(self, parts: list[ScheduledRequest], slots: list[Slot]) -> None:
        rows: list[tuple[int, int, int]] = []
        for part, slot in zip(parts, slots, strict=True):
            for block in part.new_block_ids:
                rows.append((slot.index, slot.num_blocks, block))
                slot.num_blocks += 1
        if rows:
            indices = np.array(rows, np.int32).T
            self._host_blocks[indices[0], indices[1]] = indices[2]
            where = self.upload(indices)
            self.block_table[where[0], where[1]] = where[2]

    def _share(self, parts: list[ScheduledRequest], slots: list[Slot]) -> tuple[int, int, int]:
        """Put the requests with one token that share a beginning in front; returns `StepLayout.shared`."""
        if not self.finds_shared:
            return 0, 0, 0
        count = sum(part.num_tokens == 1 for part in parts)
        rows = np.array([slot.index for slot in slots[:count]], np.int64)
        lengths = np.array([part.start + 1 for part in parts[:count]], np.int64)
        found = find_shared_prefix(self._host_blocks[rows], lengths, self.block_size)
        if found is None:
            return 0, 0, 0
        order = np.argsort(~found.members, kind="stable").tolist()
        parts[:count] = [parts[i] for i in order]
        slots[:count] = [slots[i] for i in order]
        return int(found.members.sum()), found.num_tokens, slots[0].index

    def _rotary_rows(
        self, positions: npt.NDArray[np.int64], slots: list[Slot], owner: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Longrope takes its long factors once a sequence is longer than the model was first trained for; as in
        Hugging Face, tokens computed before that keep the short ones.
        """
        if self._long_start is None:
            return positions
        prompt_lens = np.array([len(slot.request.prompt_token_ids) for slot in slots])[owner]
        is_long: npt.NDArray[np.bool_] = np.maximum(prompt_lens, positions + 1) > self._long_start
        return np.where(is_long, positions + self.max_len, positions)


def columns(tokens: Tensor) -> Tensor:
    """(3, T) of tokens (T, 3). Each row begins at a multiple of 16 bytes: kernels are compiled anew for others."""
    padded = tokens.new_empty(3, -(-len(tokens) // 4) * 4)[:, : len(tokens)]
    return padded.copy_(tokens.T)
