"""What surrounds the matrix products on a CPU, one compiled loop each: torch's operations take longer to call than to
compute where rows are few, and go through memory several times where they are many.
"""

import functools
import math
import struct
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.kernels.cpu_tasks import (
    STORED_AS,
    Task,
    array_at,
    compile_task,
    exp,
    float_of,
    narrow,
    thread_count,
    thread_number,
    wide,
)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `x` (T, size) to the residual in place, and return the residual's norm; all of one type, contiguous."""
    output = torch.empty_like(residual)
    rows, size = residual.shape
    _norm_task(residual.dtype)(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), output.data_ptr(), rows, size, _bits(eps),
        numbers=rows * size,
    )  # fmt: skip
    return output


def silu_mul(gate_up: Tensor) -> Tensor:
    """(T, 2 * size) gates and values, contiguous, to (T, size): silu(gate) * value."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(rows, size)
    _silu_task(gate_up.dtype)(gate_up.data_ptr(), output.data_ptr(), rows, size, numbers=rows * size)
    return output


def quick_gelu(x: Tensor) -> Tensor:
    """`x` times sigmoid(1.702 x), of any shape, contiguous."""
    output = torch.empty_like(x)
    _quick_gelu_task(x.dtype)(x.data_ptr(), output.data_ptr(), x.numel(), numbers=x.numel())
    return output


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_rows: Tensor,
    cache: Tensor,
    rows: Tensor,
    positions: Tensor,
    block_table: Tensor,
) -> None:
    """Rotate the queries in place, and put the rotated keys and the values into the cache, which is of their type; as
    `engine.kernels.triton_ops.rotate_and_store` does. All of it is contiguous.
    """
    tokens, heads, head_dim = qkv.shape
    _rotate_task(qkv.dtype)(
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), rotary_rows.data_ptr(), cache.data_ptr(), rows.data_ptr(),
        positions.data_ptr(), block_table.data_ptr(), tokens, heads, head_dim, len(cos), *cache.shape[1:4],
        *block_table.shape, numbers=qkv.numel(),
    )  # fmt: skip


def _bits(number: float) -> int:
    """Of a float32, as a task's arguments are whole numbers."""
    return int(struct.unpack("i", struct.pack("f", number))[0])


@functools.cache
def _norm_task(dtype: torch.dtype) -> Task:
    stored = STORED_AS[dtype]

    def task(a: Any) -> None:
        rows, size = a[4], a[5]
        x, residual = array_at(a[0], (rows, size), stored), array_at(a[1], (rows, size), stored)
        weight, output = array_at(a[2], (size,), stored), array_at(a[3], (rows, size), stored)
        for row in range(thread_number(), rows, thread_count()):
            _norm(x[row], residual[row], weight, output[row], float_of(a[6]), stored)

    return compile_task(task)


@njit(fastmath=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _norm(x: Any, residual: Any, weight: Any, output: Any, eps: Any, stored: Any) -> None:
    squares = np.float32(0)
    for i in range(len(x)):
        residual[i] = narrow(wide(residual[i]) + wide(x[i]), stored)
        squares += wide(residual[i]) * wide(residual[i])
    scale = np.float32(1) / np.float32(math.sqrt(squares / np.float32(len(x)) + eps))
    for i in range(len(x)):
        normed = narrow(wide(residual[i]) * scale, stored)
        output[i] = narrow(wide(normed) * wide(weight[i]), stored)


@njit(fastmath=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _sigmoid(x: Any) -> Any:
    """A division that may raise is not made of many numbers at once, so that it must not."""
    shrunk = exp(-abs(x))
    return (np.float32(1) if x >= np.float32(0) else shrunk) / (np.float32(1) + shrunk)


@functools.cache
def _silu_task(dtype: torch.dtype) -> Task:
    stored = STORED_AS[dtype]

    def task(a: Any) -> None:
        rows, size = a[2], a[3]
        gate_up, output = array_at(a[0], (rows, 2, size), stored), array_at(a[1], (rows, size), stored)
        for row in range(thread_number(), rows, thread_count()):
            _silu_mul(gate_up[row, 0], gate_up[row, 1], output[row], stored)

    return compile_task(task)


@njit(fastmath=True)  # type: ignore[untyped-decorator]
def _silu_mul(gate: Any, up: Any, output: Any, stored: Any) -> None:
    for i in range(len(output)):
        number = wide(gate[i])
        activated = narrow(number * _sigmoid(number), stored)  # rounded in between, as torch's operations are
        output[i] = narrow(wide(activated) * wide(up[i]), stored)


@functools.cache
def _quick_gelu_task(dtype: torch.dtype) -> Task:
    stored = STORED_AS[dtype]

    def task(a: Any) -> None:
        x, output = array_at(a[0], (a[2],), stored), array_at(a[1], (a[2],), stored)
        first, end = a[2] * thread_number() // thread_count(), a[2] * (thread_number() + 1) // thread_count()
        _quick_gelu(x[first:end], output[first:end], stored)

    return compile_task(task)


@njit(fastmath=True)  # type: ignore[untyped-decorator]
def _quick_gelu(x: Any, output: Any, stored: Any) -> None:
    for i in range(len(x)):
        number = wide(x[i])
        output[i] = narrow(number * _sigmoid(np.float32(1.702) * number), stored)


@functools.cache
def _rotate_task(dtype: torch.dtype) -> Task:
    stored = STORED_AS[dtype]

    def task(a: Any) -> None:
        tokens, heads, head_dim, block_size, kv_heads = a[8], a[9], a[10], a[13], a[14]
        qkv = array_at(a[0], (tokens, heads, head_dim), stored)
        cos, sin = array_at(a[1], (a[11], head_dim // 2), stored), array_at(a[2], (a[11], head_dim // 2), stored)
        rotary_rows = array_at(a[3], (tokens,), np.int32)
        cache = array_at(a[4], (2, a[12], block_size, kv_heads, head_dim), stored)
        rows, positions = array_at(a[5], (tokens,), np.int32), array_at(a[6], (tokens,), np.int32)
        block_table = array_at(a[7], (a[15], a[16]), np.int32)
        for t in range(thread_number(), tokens, thread_count()):
            block, slot = block_table[rows[t], positions[t] // block_size], positions[t] % block_size
            angles = rotary_rows[t]
            _rotate(qkv[t], cos[angles], sin[angles], cache[0, block, slot], cache[1, block, slot], stored)

    return compile_task(task)


@njit(fastmath=True)  # type: ignore[untyped-decorator]
def _rotate(qkv: Any, cos: Any, sin: Any, keys: Any, values: Any, stored: Any) -> None:
    """One token's. The halves of a head are the pairs' first and second members."""
    half, kv_heads = len(cos), len(keys)
    heads = len(qkv) - 2 * kv_heads
    for h in range(heads + kv_heads):
        vector = qkv[h]
        turned = vector if h < heads else keys[h - heads]
        for i in range(half):
            first, second, c, s = wide(vector[i]), wide(vector[half + i]), wide(cos[i]), wide(sin[i])
            turned[i] = narrow(first * c - second * s, stored)
            turned[half + i] = narrow(second * c + first * s, stored)
    for h in range(kv_heads):
        for i in range(2 * half):
            values[h, i] = qkv[heads + kv_heads + h, i]
