"""What of graphs can be seen without a GPU: sizes, and where rows go. The rest is in tests/gpu."""

import torch
from torch import Tensor

from engine.worker.cuda_graphs import GraphedFunction
from engine.worker.model_runner import _graph_sizes


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
        sizes = _graph_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
