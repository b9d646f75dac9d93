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
    """The longest common beginning of the most popular group: rows with the same block at the end of the shortest
    beginning that is worth the trouble.

    Args:
        blocks: (n, most blocks) the cache blocks of each sequence.
        lengths: (n) tokens of each sequence; the last one of each stays outside what is shared.
        block_size: tokens of a block.
    """
    long_enough = np.flatnonzero(lengths > _LEAST_TOKENS)
    if len(long_enough) < LEAST_MEMBERS:
        return None
    last_block = blocks[long_enough, -(-_LEAST_TOKENS // block_size) - 1]
    _, which, counts = np.unique(last_block, return_inverse=True, return_counts=True)
    if counts.max() < LEAST_MEMBERS:
        return None
    members = np.zeros(len(blocks), bool)
    members[long_enough[which == counts.argmax()]] = True
    limit = (int(lengths[members].min()) - 1) // block_size
    group = blocks[members, :limit]
    differs = (group != group[0]).any(axis=0)
    num_tokens = (int(differs.argmax()) if differs.any() else limit) * block_size
    return SharedPrefix(members, num_tokens) if num_tokens >= _LEAST_TOKENS else None
