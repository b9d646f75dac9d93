"""Work that a GPU is given is timed where it runs."""

import time

import torch

from engine.worker.timer import DeviceTimer


def test_work_is_timed_not_its_launch() -> None:
    square = torch.randn(4096, 4096, device="cuda")
    square @ square
    torch.cuda.synchronize()
    begun = time.monotonic()
    with DeviceTimer(square.device) as timer:
        for _ in range(20):
            square @ square
    launched = time.monotonic() - begun
    torch.cuda.synchronize()
    waited = time.monotonic() - begun
    assert launched < timer.seconds <= waited
