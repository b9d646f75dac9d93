"""Paged attention of one token a request on a CPU: keys and values are read where they lie in the cache."""

import functools
import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.kernels.cpu_tasks import STORED_AS, Task, array_at, compile_task, exp, thread_count, thread_number, wide

_TASKS_PER_THREAD = 2
"""At least, so that none waits long for another one."""


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
    _, num_blocks, block_size, kv_heads, _ = cache.shape
    threads = torch.get_num_threads()
    # Few sequences are cut into parts, so that every thread has something to do; their results are merged.
    parts = -(-_TASKS_PER_THREAD * threads // num_requests)
    wide_query = query.float() * scale
    outputs = torch.zeros(num_requests, parts, heads, head_dim)
    weights = torch.empty(num_requests, parts, heads)
    scores = torch.empty(threads, heads, -(-int(ends.max()) // parts))
    _task(cache.dtype)(
        wide_query.data_ptr(), outputs.data_ptr(), weights.data_ptr(), cache.data_ptr(), block_table.data_ptr(),
        rows.data_ptr(), firsts.data_ptr(), ends.data_ptr(), scores.data_ptr(), num_requests, parts, heads, head_dim,
        num_blocks, block_size, kv_heads, *block_table.shape, threads, scores.shape[2],
    )  # fmt: skip
    if parts > 1:
        outputs = (outputs * weights.softmax(1).unsqueeze(-1)).sum(1)
    return outputs.view(query.shape).to(query.dtype)


@functools.cache
def _task(dtype: torch.dtype) -> Task:
    stored = STORED_AS[dtype]

    def task(a: Any) -> None:
        num_requests, parts, heads, head_dim = a[9], a[10], a[11], a[12]
        query = array_at(a[0], (num_requests, heads, head_dim), np.float32)
        outputs = array_at(a[1], (num_requests, parts, heads, head_dim), np.float32)
        weights = array_at(a[2], (num_requests, parts, heads), np.float32)
        cache = array_at(a[3], (2, a[13], a[14], a[15], head_dim), stored)
        block_table = array_at(a[4], (a[16], a[17]), np.int32)
        rows = array_at(a[5], (num_requests,), np.int64)
        firsts = array_at(a[6], (num_requests,), np.int64)
        ends = array_at(a[7], (num_requests,), np.int64)
        scores = array_at(a[8], (a[18], heads, a[19]), np.float32)[thread_number()]
        for number in range(thread_number(), num_requests * parts, thread_count()):
            i, part = number // parts, number % parts
            length = ends[i] - firsts[i]
            first, end = firsts[i] + length * part // parts, firsts[i] + length * (part + 1) // parts
            blocks = block_table[rows[i]]
            _score(query[i], cache[0], blocks, first, end, scores)
            for q in range(heads):
                weights[i, part, q] = _softmax(scores[q, : end - first])
            _weigh(outputs[i, part], cache[1], blocks, first, end, scores)

    return compile_task(task)


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


@njit(fastmath=True)  # type: ignore[untyped-decorator]
def _softmax(scores: Any) -> Any:
    """In place; returns the logarithm of what they were divided by, and of no scores a very small number."""
    if len(scores) == 0:
        return np.float32(-1e30)
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
