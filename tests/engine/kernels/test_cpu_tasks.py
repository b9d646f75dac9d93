"""Loops compiled for the CPU."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from engine.kernels import cpu_features, cpu_tasks
from engine.kernels.cpu_tasks import array_at, compile_task, exp, thread_count, thread_number


def fill(a: Any) -> None:
    """Each thread's element becomes 1, and the first one of the second row the number of threads."""
    array = array_at(a[0], (2, a[1]), np.float32)
    array[0, thread_number()] += 1
    array[1, 0] = thread_count()


def run_fill(threads: int) -> torch.Tensor:
    array, before = torch.zeros(2, 4), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compile_task(fill)(array.data_ptr(), 4)
    finally:
        torch.set_num_threads(before)
    return array


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_runs_once_on_each_thread(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    array = run_fill(threads)
    assert array[0].tolist() == [1.0] * threads + [0.0] * (4 - threads)
    assert array[1, 0] == threads


def test_is_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_fill(1)
    kept = set(tmp_path.rglob("*.nbc"))
    assert len(kept) == 1
    run_fill(1)
    assert set(tmp_path.rglob("*.nbc")) == kept


def test_another_version_is_compiled_anew(tmp_path: Path) -> None:
    source = tmp_path / "task.py"
    source.write_text("a")
    first = cpu_tasks._cache_folder(str(source))
    source.write_text("b")
    assert cpu_tasks._cache_folder(str(source)) != first


def test_without_a_folder_to_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert run_fill(2)[1, 0] == 2


def test_exp() -> None:
    @njit(fastmath=True)  # type: ignore[untyped-decorator]
    def all_of(numbers: Any, results: Any) -> None:
        for i in range(len(numbers)):
            results[i] = exp(numbers[i])

    numbers = np.concatenate(([0.0], -np.logspace(-6, 1.9, 5000))).astype(np.float32)
    results = np.empty_like(numbers)
    all_of(numbers, results)
    assert results[0] == 1
    np.testing.assert_allclose(results, np.exp(numbers.astype(np.float64)), rtol=6e-6)
    all_of(np.array([-1e30, -200], np.float32), results[:2])
    assert (results[:2] < 1e-37).all()


def test_a_build_of_torch_with_another_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise AttributeError("GOMP_parallel")

    monkeypatch.setattr(cpu_tasks, "_openmp", missing)
    assert not cpu_tasks.is_usable.__wrapped__()


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "find_spec", lambda name: None)
    assert not cpu_features.runs_compiled.__wrapped__()


def test_it_runs_here() -> None:
    assert cpu_features.runs_compiled()
    assert math.isfinite(float(run_fill(1).sum()))
