"""Products of few rows with a weight on a CPU: each number of the weight is read and widened once for four rows."""

import functools
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.kernels.cpu_tasks import STORED_AS, Task, array_at, compile_task, thread_count, thread_number, wide


def works_on(weight: Tensor) -> bool:
    """Whether `thin_linear` multiplies with it."""
    return weight.dtype in STORED_AS and weight.is_contiguous()


def thin_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` (rows, in) times the transpose of `weight` (out, in), summed in float32."""
    wide_x = x.float().contiguous()
    output = torch.empty(x.shape[0], weight.shape[0])
    _task(weight.dtype)(weight.data_ptr(), wide_x.data_ptr(), output.data_ptr(), *weight.shape, x.shape[0])
    return output.to(x.dtype)


@functools.cache
def _task(dtype: torch.dtype) -> Task:
    stored = STORED_AS[dtype]

    def task(a: Any) -> None:
        weight = array_at(a[0], (a[3], a[4]), stored)
        x = array_at(a[1], (a[5], a[4]), np.float32)
        _multiply(weight, x, array_at(a[2], (a[5], a[3]), np.float32), thread_number(), thread_count())

    return compile_task(task)


@njit(fastmath=True)  # type: ignore[untyped-decorator]
def _multiply(weight: Any, x: Any, output: Any, thread: int, threads: int) -> None:
    """A thread's share of the outputs, one after the other: memory is read fastest in its own order."""
    rows, size = x.shape[0], weight.shape[0]
    for out in range(size * thread // threads, size * (thread + 1) // threads):
        row = 0
        while row + 4 <= rows:
            sums = _four_dots(weight[out], x[row], x[row + 1], x[row + 2], x[row + 3])
            output[row, out], output[row + 1, out], output[row + 2, out], output[row + 3, out] = sums
            row += 4
        while row < rows:
            output[row, out] = _dot(weight[out], x[row])
            row += 1


@njit(fastmath=True)  # type: ignore[untyped-decorator]
def _four_dots(w: Any, x0: Any, x1: Any, x2: Any, x3: Any) -> Any:
    """Sums with names stay in registers."""
    s0 = s1 = s2 = s3 = np.float32(0)
    for k in range(len(w)):
        number = wide(w[k])
        s0 += number * x0[k]
        s1 += number * x1[k]
        s2 += number * x2[k]
        s3 += number * x3[k]
    return s0, s1, s2, s3


@njit(fastmath=True)  # type: ignore[untyped-decorator]
def _dot(w: Any, x: Any) -> Any:
    total = np.float32(0)
    for k in range(len(w)):
        total += wide(w[k]) * x[k]
    return total
