"""Functions whose hundreds of kernels are launched as one: captured once for each batch size, then replayed."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm


class GraphedFunction:
    """A function of one tensor, captured for several numbers of rows.

    Args:
        function: takes the rows; what it returns is the same tensor every time, overwritten by each call.
        inputs: as many rows as the largest size, with values that the function can take.
        sizes: numbers of rows.
    """

    def __init__(self, function: Callable[[Tensor], Any], inputs: Tensor, sizes: list[int]) -> None:
        self._function = function
        self._inputs = inputs
        self._sizes = sorted(sizes)
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def capture(self, pool: Any, name: str) -> None:
        """Capture every size, the largest first, so that the smaller ones find their memory in its pool."""
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        for size in tqdm(self._sizes[::-1], desc=f"Capturing {name}", unit="graph", disable=None):
            rows = self._inputs[:size]
            with torch.cuda.stream(stream):
                self._function(rows)  # compiles and sets up what a capture must not
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                outputs = self._function(rows)
            self._captured[size] = graph, outputs
        torch.cuda.current_stream().wait_stream(stream)

    def padded_size(self, count: int) -> int | None:
        """The smallest size that holds so many rows; None if none does."""
        return next((size for size in self._sizes if size >= count), None)

    def __call__(self, rows: Tensor) -> Any:
        """What the function returns for rows, as many as one of the sizes; it lasts until the next call."""
        inputs = self._inputs[: len(rows)]
        inputs.copy_(rows, non_blocking=True)
        if not self._captured:
            return self._function(inputs)
        graph, outputs = self._captured[len(rows)]
        graph.replay()
        return outputs


@lru_cache(maxsize=1)
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: memory that was freed on one stream serves no other."""
    return torch.cuda.Stream()
