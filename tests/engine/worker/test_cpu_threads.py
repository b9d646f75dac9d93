"""Threads on a CPU."""

import os
from pathlib import Path

import pytest
import torch

from engine.worker import cpu_threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight processors, of which each two are one core."""
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    monkeypatch.setattr(cpu_threads, "_CPUS", tmp_path)
    monkeypatch.setattr(cpu_threads, "_SHARE", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


@pytest.mark.parametrize(
    ("share", "cores"),
    [
        (None, 4),
        ("max 100000", 4),
        ("200000 100000", 2),
        ("50000 100000", 1),
        ("160000 100000", 2),
        ("900000 100000", 4),
    ],
)
def test_no_more_than_the_share(machine: Path, share: str | None, cores: int) -> None:
    if share is not None:
        (machine / "cpu.max").write_text(share + "\n")
    assert cpu_threads.usable_cores() == cores


def test_only_what_the_process_is_bound_to(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 6})
    assert cpu_threads.usable_cores() == 2


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_CPUS", tmp_path)
    monkeypatch.setattr(cpu_threads, "_SHARE", tmp_path / "cpu.max")
    assert cpu_threads.usable_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("given", "usable", "expected"), [(8, 2, 2), (1, 2, 1)])
def test_torch_is_told(given: int, usable: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [given]
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: usable)
    cpu_threads.use_cores()
    assert told[-1] == expected
