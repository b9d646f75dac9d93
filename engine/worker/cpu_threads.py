"""How many threads compute on a CPU."""

import logging
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_CPUS = Path("/sys/devices/system/cpu")
_SHARE = Path("/sys/fs/cgroup/cpu.max")


def use_cores() -> None:
    """One thread for each core, unless torch was told to take fewer. By itself it counts all cores of the machine, of
    which a container's share may be a few: threads that wait for each other's turn are many times slower.
    """
    given = torch.get_num_threads()
    threads = min(given, usable_cores())
    if threads < given:
        torch.set_num_threads(threads)
    logger.info("computing on %d threads (OMP_NUM_THREADS sets fewer)", threads)


def usable_cores() -> int:
    """Cores that this process may run on, two threads of one counted once, and no more than its group's share."""
    numbers = os.sched_getaffinity(0)
    cores = {_read(_CPUS / f"cpu{number}/topology/thread_siblings_list") or str(number) for number in numbers}
    share, _, period = _read(_SHARE).partition(" ")  # microseconds in each period, or "max"
    if not share.isdigit():
        return len(cores)
    return max(1, min(len(cores), round(int(share) / int(period))))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
