"""Counter-based random numbers: the same seed gives the same noise in any batch, on any device."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def noise_keys(seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """One key (rows) for each seed and position."""
    seeds_u, positions_u = seeds.astype(np.uint64), positions.astype(np.uint64)
    return _mix_host(_mix_host(seeds_u) + positions_u * np.uint64(_GOLDEN)).astype(np.int64)


def gumbel_noise(keys: Tensor, width: int) -> Tensor:
    """Standard Gumbel noise (rows, width) float32 from keys (rows) int64: adding it to logits and taking the largest
    samples from their softmax (Gumbel, 1954).
    """
    columns = torch.arange(width, device=keys.device) * _signed(_GOLDEN)
    bits = _mix_device(keys.unsqueeze(1) + columns)
    # 23 bits and a half are exact in float32; with one bit more the largest would be rounded to 1, its noise infinite.
    uniform = (((bits >> 41) & 0x7FFFFF).float() + 0.5) * 2.0**-23
    return uniform.log_().neg_().log_().neg_()


def _mix_host(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


def _mix_device(x: Tensor) -> Tensor:
    """The same in int64, whose products wrap alike but whose right shift must be cleared of the sign."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(_MIX_1)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(_MIX_2)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
