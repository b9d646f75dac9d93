"""How long a device works on something, measured without waiting for it."""

import time
from types import TracebackType
from typing import Any, Self

import torch


class DeviceTimer:
    """Times the work of a `with` block: by events on a GPU, where the host only launches it, by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[Any] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._seconds = 0.0

    def __enter__(self) -> Self:
        self._seconds = -time.monotonic()
        if self._events:
            self._events[0].record()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._seconds += time.monotonic()
        if self._events:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        """Of the block's work, which must be done by now."""
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._seconds
