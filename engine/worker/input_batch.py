"""The requests that run, as rows of tables on the device, and one step's inputs gathered from them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.messages import EngineRequest
from engine.step import NewRequest, SchedulerOutput


@dataclass(slots=True)
class Slot:
    """Where a running request's data lies."""

    index: int
    request: EngineRequest
    num_blocks: int
    images_end: int
    """Index behind the last image token; 0 without images."""


@dataclass(slots=True)
class StepInputs:
    """One step's tokens, `T` in all, of `R` requests; `S` of those sample."""

    input_ids: Tensor
    """(T) int64."""
    rotary_rows: Tensor
    """(T) int64 rows of the rotary table."""
    metadata: AttentionMetadata
    sample_rows: Tensor
    """(S) int64 indices into the T tokens."""
    sample_slots: npt.NDArray[np.int64]
    """(S) table rows of the requests that sample."""
    sample_positions: npt.NDArray[np.int64]
    """(S) index that the sampled token will have in its sequence."""
    sample_slots_dev: Tensor
    sample_positions_dev: Tensor


class InputBatch:
    """Slots that outlive a step: token ids and block tables stay on the device and change in place.

    Sampled ids are written where the next step reads them, so the host need not see a token before it can launch the
    step that consumes it.
    """

    def __init__(
        self, num_slots: int, max_len: int, block_size: int, device: torch.device, *, long_start: int | None
    ) -> None:
        self.device = device
        self.block_size = block_size
        self.max_len = max_len
        self._long_start = long_start
        max_blocks = -(-max_len // block_size)
        self.token_table = torch.zeros(num_slots, max_len + 1, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
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
        self.block_table[slot.index, : len(new.block_ids)] = self.upload(np.asarray(new.block_ids, np.int32))
        return slot

    def upload(self, array: npt.NDArray[np.generic]) -> Tensor:
        """Copy to the device without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def prepare(self, step: SchedulerOutput) -> StepInputs:
        """Gather a step's inputs. Everything whose size depends on the tokens is computed on the device."""
        parts = step.requests
        slots = [self.slots[part.request_id] for part in parts]
        self._append_blocks(step, slots)
        slot_index = np.array([slot.index for slot in slots], np.int64)
        starts = np.array([part.start for part in parts], np.int64)
        counts = np.array([part.num_tokens for part in parts], np.int64)
        samples = np.array([part.samples for part in parts], bool)
        query_start = np.concatenate(([0], np.cumsum(counts)))
        ends = starts + counts
        prompt_lens = np.array([len(slot.request.prompt_token_ids) for slot in slots], np.int64)

        packed = self.upload(np.stack((slot_index, starts, counts, query_start[:-1], ends, prompt_lens)))
        sample_packed = self.upload(np.stack((query_start[1:][samples] - 1, slot_index[samples], ends[samples])))
        total = int(query_start[-1])
        owner = torch.repeat_interleave(packed[2], output_size=total)
        within = torch.arange(total, device=self.device) - packed[3][owner]
        positions = packed[1][owner] + within
        rows = packed[0][owner]
        blocks = self.block_table[rows, positions // self.block_size].long()
        most_blocks = -(-int(ends.max()) // self.block_size)
        metadata = AttentionMetadata(
            query_start=query_start.tolist(),
            seq_lens=ends.tolist(),
            query_start_dev=self.upload(query_start.astype(np.int32)),
            seq_lens_dev=packed[4].int(),
            block_table=self.block_table[packed[0], :most_blocks],
            slot_mapping=blocks * self.block_size + positions % self.block_size,
        )
        return StepInputs(
            input_ids=self.token_table[rows, positions].long(),
            rotary_rows=self._rotary_rows(positions, packed[5][owner]),
            metadata=metadata,
            sample_rows=sample_packed[0],
            sample_slots=slot_index[samples],
            sample_positions=ends[samples],
            sample_slots_dev=sample_packed[1],
            sample_positions_dev=sample_packed[2],
        )

    def write_sampled(self, inputs: StepInputs, tokens: Tensor) -> None:
        """Put the sampled ids (S) where the next step will read them."""
        self.token_table[inputs.sample_slots_dev, inputs.sample_positions_dev] = tokens.int()

    def _append_blocks(self, step: SchedulerOutput, slots: list[Slot]) -> None:
        rows: list[tuple[int, int, int]] = []
        for part, slot in zip(step.requests, slots, strict=True):
            for block in part.new_block_ids:
                rows.append((slot.index, slot.num_blocks, block))
                slot.num_blocks += 1
        if rows:
            where = self.upload(np.array(rows, np.int64).T)
            self.block_table[where[0], where[1]] = where[2].int()

    def _rotary_rows(self, positions: Tensor, prompt_lens: Tensor) -> Tensor:
        """Longrope takes its long factors once a sequence is longer than the model was first trained for; as in
        Hugging Face, tokens computed before that keep the short ones.
        """
        if self._long_start is None:
            return positions
        is_long = torch.maximum(prompt_lens, positions + 1) > self._long_start
        return positions + is_long * self.max_len
