"""Paged attention of one token a request on a CPU: keys and values are read where they lie in the cache."""

import functools
import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.kernels.cpu_tasks import STORED_AS, Task, array_at, compile_task, exp, thread_count, thread_number, wide

_PART = 128
"""Positions of a sequence that a thread attends to at once, at most. How it is cut depends on its length alone, and the
parts are merged in their order: an answer is the same whatever is computed beside it.
"""


def works_on(cache: Tensor) -> bool:
    """Whether `decode_attention` reads it."""
    return cache.dtype in STORED_AS


def decode_attention(
    query: Tensor, cache: Tensor, block_table: Tensor, rows: Tensor, firsts: Tensor, ends: Tensor, *, scale: float
) -> Tensor:
    """Attend with one token of each of `R` requests.

    Args:
        query: (R, heads, head_dim) of any type.
        cache: (2, blocks, block_size, kv_heads, head_dim), contiguous.
        block_table: (slots, blocks) int32.
        rows: (R) int64 the requests' rows of the block table.
        firsts: (R) int64 the first position that each of them sees.
        ends: (R) int64 tokens of each sequence.
        scale: of the scores.

    Returns:
        (R, heads, head_dim), of the queries' type.
    """
    num_requests, heads, head_dim = query.shape
    wide_query = query.float() * scale
    parts = int((-(-(ends - firsts) // _PART)).sum())
    parted, logs = torch.zeros(parts, heads, head_dim), torch.empty(parts, heads)
    scores = torch.empty(torch.get_num_threads(), heads, _PART)
    output = torch.zeros(num_requests, heads, head_dim)
    attend, merge = _tasks(cache.dtype)
    shape = num_requests, heads, head_dim, parts
    attend(
        *shape, firsts.data_ptr(), ends.data_ptr(), parted.data_ptr(), logs.data_ptr(), wide_query.data_ptr(),
        cache.data_ptr(), block_table.data_ptr(), rows.data_ptr(), scores.data_ptr(), *cache.shape[1:4],
        *block_table.shape, len(scores),
    )  # fmt: skip
    merge(
        *shape, firsts.data_ptr(), ends.data_ptr(), parted.data_ptr(), logs.data_ptr(), output.data_ptr(),
        numbers=parted.numel(),
    )  # fmt: skip
    return output.to(query.dtype)


@functools.cache
def _tasks(dtype: torch.dtype) -> tuple[Task, Task]:
    """What attends to the parts, and what merges them."""
    stored = STORED_AS[dtype]

    def attend(a: Any) -> None:
        num_requests, heads, head_dim, parts = a[0], a[1], a[2], a[3]
        firsts, ends = array_at(a[4], (num_requests,), np.int64), array_at(a[5], (num_requests,), np.int64)
        parted, logs = array_at(a[6], (parts, heads, head_dim), np.float32), array_at(a[7], (parts, heads), np.float32)
        query = array_at(a[8], (num_requests, heads, head_dim), np.float32)
        cache = array_at(a[9], (2, a[13], a[14], a[15], head_dim), stored)
        block_table = array_at(a[10], (a[16], a[17]), np.int32)
        rows = array_at(a[11], (num_requests,), np.int64)
        scores = array_at(a[12], (a[18], heads, _PART), np.float32)[thread_number()]
        number = 0
        for i in range(num_requests):
            length, blocks = ends[i] - firsts[i], block_table[rows[i]]
            count = (length + _PART - 1) // _PART
            for part in range(count):
                if number % thread_count() == thread_number():
                    first, end = firsts[i] + length * part // count, firsts[i] + length * (part + 1) // count
                    _score(query[i], cache[0], blocks, first, end, scores)
                    for q in range(heads):
                        logs[number, q] = _softmax(scores[q, : end - first])
                    _weigh(parted[number], cache[1], blocks, first, end, scores)
                number += 1

    def merge(a: Any) -> None:
        num_requests, heads, head_dim, parts = a[0], a[1], a[2], a[3]
        firsts, ends = array_at(a[4], (num_requests,), np.int64), array_at(a[5], (num_requests,), np.int64)
        parted, logs = array_at(a[6], (parts, heads, head_dim), np.float32), array_at(a[7], (parts, heads), np.float32)
        output = array_at(a[8], (num_requests, heads, head_dim), np.float32)
        number = 0
        for i in range(num_requests):
            end = number + (ends[i] - firsts[i] + _PART - 1) // _PART
            if i % thread_count() == thread_number():
                _merge(parted[number:end], logs[number:end], output[i])
            number = end

    return compile_task(attend), compile_task(merge)


@njit(fastmath=True)  # type: ignore[untyped-decorator]
def _score(query: Any, keys: Any, blocks: Any, first: int, end: int, scores: Any) -> None:
    """Scores (heads, positions) of the positions from `first` to `end`, in the order in which keys lie in memory."""
    block_size, kv_heads, head_dim = keys.shape[1:]
    group = query.shape[0] // kv_heads
    for position in range(first, end):
        row = keys[blocks[position // block_size], position % block_size]
        for h in range(kv_heads):
            key = row[h]
            for q in range(h * group, (h + 1) * group):
                queries, total = query[q], np.float32(0)
                for d in range(head_dim):
                    total += queries[d] * wide(key[d])
                scores[q, position - first] = total


@njit(fastmath=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _softmax(scores: Any) -> Any:
    """In place; returns the logarithm of what they were divided by."""
    largest, total = scores[0], np.float32(0)
    for score in scores:
        largest = max(largest, score)
    for t in range(len(scores)):
        scores[t] = exp(scores[t] - largest)
        total += scores[t]
    for t in range(len(scores)):
        scores[t] /= total
    return largest + np.float32(math.log(total))


@njit(fastmath=True)  # type: ignore[untyped-decorator]
def _weigh(output: Any, values: Any, blocks: Any, first: int, end: int, scores: Any) -> None:
    """Add the values up."""
    block_size, kv_heads, head_dim = values.shape[1:]
    group = output.shape[0] // kv_heads
    for position in range(first, end):
        row = values[blocks[position // block_size], position % block_size]
        for h in range(kv_heads):
            value = row[h]
            for q in range(h * group, (h + 1) * group):
                total, weight = output[q], scores[q, position - first]
                for d in range(head_dim):
                    total[d] += weight * wide(value[d])


@njit(fastmath=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _merge(parted: Any, logs: Any, output: Any) -> None:
    """The results (parts, heads, head_dim) of one request, each weighed by what its scores were divided by."""
    for q in range(len(output)):
        largest, total = logs[0, q], np.float32(0)
        for part in range(len(parted)):
            largest = max(largest, logs[part, q])
        for part in range(len(parted)):
            weight = exp(logs[part, q] - largest)
            total += weight
            for d in range(output.shape[1]):
                output[q, d] += weight * parted[part, q, d]
        for d in range(output.shape[1]):
            output[q, d] /= total
