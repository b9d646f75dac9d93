"""Which requests begin with the same blocks."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import EngineRequest
from engine.sampling_params import SamplingParams
from engine.step import NewRequest, ScheduledRequest, SchedulerOutput
from engine.worker.input_batch import InputBatch
from engine.worker.shared_prefix import find_shared_prefix

BLOCK = 16


FAMILIES = st.sampled_from([0, 0, 0, 1])
LENGTHS = st.integers(100, 14 * BLOCK) | st.integers(129, 14 * BLOCK)


@given(st.lists(st.tuples(FAMILIES, st.sampled_from([0, 3, 8, 9, 12, 14, 14, 14]), LENGTHS), min_size=12, max_size=40))
def test_what_is_shared_is_shared_and_most_that_is(rows: list[tuple[int, int, int]]) -> None:
    """Sequences of one of two families, that leave their family after some blocks."""
    blocks = np.full((len(rows), 14), -1, np.int32)
    for i, (family, common, _) in enumerate(rows):
        blocks[i] = [1000 * family + b if b < common else 10_000 + 100 * i + b for b in range(14)]
    lengths = np.array([length for _, _, length in rows])
    found = find_shared_prefix(blocks, lengths, BLOCK)

    eighth = [int(row[7]) if length > 128 else None for row, length in zip(blocks, lengths, strict=True)]
    popular = max(eighth.count(block) for block in eighth if block is not None) if any(eighth) else 0
    if found is None:
        assert popular < 8
        return
    members = np.flatnonzero(found.members).tolist()
    assert len(members) == popular >= 8 and len({eighth[i] for i in members}) == 1
    count = found.num_tokens // BLOCK
    assert found.num_tokens == count * BLOCK >= 128 and all(found.num_tokens < lengths[i] for i in members)
    assert all((blocks[i, :count] == blocks[members[0], :count]).all() for i in members)
    longer = count < 14 and all(
        (count + 1) * BLOCK < lengths[i] and blocks[i, count] == blocks[members[0], count] for i in members
    )
    assert not longer


def test_a_system_prompt_before_two_pictures() -> None:
    """All begin alike, but two groups go on differently: the larger group is found, a short sequence hinders nobody."""
    blocks = np.array([[0, 1, *range(100 * (i % 3 > 0) + 2, 100 * (i % 3 > 0) + 14)] for i in range(30)], np.int32)
    lengths = np.full(30, 200)
    lengths[4] = 20
    found = find_shared_prefix(blocks, lengths, BLOCK)
    assert found is not None and found.num_tokens == 192
    assert np.flatnonzero(found.members).tolist() == [i for i in range(30) if i % 3 > 0 and i != 4]


def test_an_outlier_hinders_nobody() -> None:
    """One is short, one leaves the others early: these share what most share all the same."""
    blocks = np.tile(np.arange(44, dtype=np.int32), (30, 1))
    blocks[:, 39:] += 100 * np.arange(1, 31, dtype=np.int32)[:, None]
    blocks[7, 8:] += 5000
    lengths = np.full(30, 700)
    lengths[4] = 130
    found = find_shared_prefix(blocks, lengths, BLOCK)
    assert found is not None and found.num_tokens == 39 * BLOCK
    assert np.flatnonzero(~found.members).tolist() == [4, 7]


def test_a_short_beginning_of_many_beats_a_long_one_of_few() -> None:
    blocks = np.tile(np.arange(44, dtype=np.int32), (100, 1))
    blocks[10:, 20:] += 100 * np.arange(1, 91, dtype=np.int32)[:, None]
    found = find_shared_prefix(blocks, np.full(100, 700), BLOCK)
    assert found is not None and found.num_tokens == 20 * BLOCK and found.members.all()


def test_who_shares_comes_first() -> None:
    batch = InputBatch(16, 320, BLOCK, torch.device("cpu"), long_start=None, finds_shared=True)
    names = [f"r{i}" for i in range(12)]
    for i, name in enumerate(names):
        shared = list(range(100, 110)) if i % 4 else [200 + i]
        blocks = [*shared, *range(1000 + 20 * i, 1020 + 20 * i - len(shared))]
        request = EngineRequest(name, [5] * 180, SamplingParams(), 9, 0)
        batch.add(NewRequest(request, [5] * 180, blocks))
    parts = [ScheduledRequest(name, 179, 1, True, [], 0) for name in names]
    parts.insert(3, ScheduledRequest("p", 0, 40, False, [], 0))
    batch.add(NewRequest(EngineRequest("p", [5] * 180, SamplingParams(), 9, 0), [5] * 180, list(range(100, 112))))
    layout = batch.lay_out(SchedulerOutput(requests=parts))
    members, tokens, slot = layout.shared
    assert (members, tokens) == (9, 160)
    assert [part.request_id for part in layout.parts[:9]] == [name for i, name in enumerate(names) if i % 4]
    assert layout.parts[-1].request_id == "p" and layout.num_decodes == 12
    assert slot == batch.slots["r1"].index
    assert [s.request.request_id for s in layout.slots] == [part.request_id for part in layout.parts]


def test_nothing_is_looked_for_unless_asked() -> None:
    batch = InputBatch(16, 320, BLOCK, torch.device("cpu"), long_start=None)
    for i in range(10):
        request = EngineRequest(str(i), [5] * 180, SamplingParams(), 9, 0)
        batch.add(NewRequest(request, [5] * 180, list(range(12))))
    parts = [ScheduledRequest(str(i), 179, 1, True, [], 0) for i in range(10)]
    assert batch.lay_out(SchedulerOutput(requests=parts)).shared == (0, 0, 0)
