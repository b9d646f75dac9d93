"""What of graphs can be seen without a GPU: sizes, and where rows go. The rest is in tests/gpu."""

import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.messages import EngineRequest
from engine.sampling_params import SamplingParams
from engine.step import NewRequest, ScheduledRequest, SchedulerOutput
from engine.worker.cuda_graphs import GraphedFunction
from engine.worker.decode_graphs import decode_sizes
from engine.worker.input_batch import InputBatch
from engine.worker.step_graphs import StepGraphs, step_sizes


def test_rows_go_through_the_static_input() -> None:
    seen: list[Tensor] = []

    def double(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows * 2

    inputs = torch.zeros(8, 2)
    graphed = GraphedFunction(double, inputs, [8, 2, 4])
    rows = torch.arange(8.0).view(4, 2)
    assert torch.equal(graphed(rows), rows * 2)
    assert seen[0].data_ptr() == inputs.data_ptr()
    assert [graphed.padded_size(count) for count in (1, 2, 3, 5, 8, 9)] == [2, 2, 4, 8, 8, None]


def test_sizes_reach_every_batch() -> None:
    for most in (1, 2, 3, 8, 64, 65, 100, 256):
        sizes = decode_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most


def test_step_sizes_reach_every_step() -> None:
    for most in (1, 7, 16, 100, 1500, 2048, 4096):
        sizes = step_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most


def test_a_step_is_laid_where_its_graph_reads_it() -> None:
    """Two decodes, then prompts of 5 and 9 tokens, in tiles of 4 tokens; the second step is shorter than the first."""
    batch = InputBatch(8, 64, 16, torch.device("cpu"), long_start=None, tile_tokens=4)
    seen: list[AttentionMetadata] = []
    cut: list[tuple[list[list[int]], list[list[int]]]] = []

    def forward(hidden: Tensor, metadata: AttentionMetadata) -> Tensor:
        seen.append(metadata)
        cut.append((metadata.prefills.T.tolist(), metadata.tiles.T.tolist()))
        return hidden + 1

    graphs = StepGraphs(
        forward, batch, hidden_size=2, dtype=torch.float32, max_tokens=32, max_requests=8, tile_tokens=4
    )
    new = [
        NewRequest(EngineRequest(name, [7] * 20, SamplingParams(), 4, 0), [7] * 20, [i, i + 4])
        for i, name in enumerate("abcd")
    ]
    spans = {"a": (3, 5), "b": (19, 1), "c": (0, 9), "d": (2, 1)}
    parts = [ScheduledRequest(name, start, count, name == "b", [], 0) for name, (start, count) in spans.items()]
    for request in new:
        batch.add(request)
    slot = {name: batch.slots[name].index for name in spans}
    for some in (parts, parts[1:2]):
        layout = batch.lay_out(SchedulerOutput(requests=some))
        size = graphs.padded_size(layout)
        assert size == 16
        hidden = torch.rand(size, 2)
        found = graphs(layout, torch.from_numpy(batch.padded(layout, size)), hidden)
        assert torch.equal(found, hidden + 1)
    first, second = seen
    assert second.counts is not None and second.counts.tolist() == [1, 0]
    assert first.prefills.data_ptr() == second.prefills.data_ptr()
    assert first.token_rows[:2].tolist() == [slot["b"], slot["d"]] and first.positions[:2].tolist() == [19, 2]
    assert second.token_rows[1:].tolist() == [batch.padding_slot] * 15
    prefills, tiles = cut[0]
    assert prefills[:2] == [[2, 5, 8, slot["a"]], [7, 9, 9, slot["c"]]]
    assert tiles[:5] == [[1, 8], [0, 4], [1, 4], [0, 0], [1, 0]]  # by the keys they see
    assert first.counts is not None and first.shared is None
    assert not any(map(any, cut[1][0] + cut[1][1]))
