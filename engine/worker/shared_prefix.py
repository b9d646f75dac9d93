"""Finds requests that begin with the same cache blocks, so that attention need read these only once a step."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LEAST_MEMBERS = 8
_LEAST_TOKENS = 128


class SharedPrefix(NamedTuple):
    """The beginning that most rows share, where it is worth the trouble."""

    members: npt.NDArray[np.bool_]
    """(n) which rows have it."""
    num_tokens: int


def find_shared_prefix(
    blocks: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], block_size: int
) -> SharedPrefix | None:
    """The common beginning that saves the most reading: a long one of some rows, or a shorter one of more.

    Rows with the same block at one place have all blocks before it in common. So the most popular group is looked for
    at a few places, each twice as far as the one before, and how far beyond that place it has all in common.

    Args:
        blocks: (n, most blocks) the cache blocks of each sequence.
        lengths: (n) tokens of each sequence; the last one of each stays outside what is shared.
        block_size: tokens of a block.
    """
    best, saved = None, 0
    tokens = _LEAST_TOKENS
    while (members := _most_popular(blocks, lengths, -(-tokens // block_size), block_size)) is not None:
        limit = (int(lengths[members].min()) - 1) // block_size
        group = blocks[members, :limit]
        differs = (group != group[0]).any(axis=0)
        num_tokens = (int(differs.argmax()) if differs.any() else limit) * block_size
        if num_tokens >= _LEAST_TOKENS and (len(group) - 1) * num_tokens > saved:
            best, saved = SharedPrefix(members, num_tokens), (len(group) - 1) * num_tokens
        tokens = max(2 * tokens, num_tokens + 1)
    return best


def _most_popular(
    blocks: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], count: int, block_size: int
) -> npt.NDArray[np.bool_] | None:
    """(n) The rows of the largest group with so many blocks in common, if it is large enough."""
    long_enough = np.flatnonzero(lengths > count * block_size)
    if len(long_enough) < LEAST_MEMBERS:
        return None
    _, which, counts = np.unique(blocks[long_enough, count - 1], return_inverse=True, return_counts=True)
    if counts.max() < LEAST_MEMBERS:
        return None
    members = np.zeros(len(blocks), bool)
    members[long_enough[which == counts.argmax()]] = True
    return members
