import time

import torch

from engine.worker.timer import DeviceTimer


def test_clock_of_the_cpu() -> None:
    with DeviceTimer(torch.device("cpu")) as timer:
        time.sleep(0.02)
    assert 0.02 <= timer.seconds < 5
