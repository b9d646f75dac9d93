"""How many programs to start where only the GPU knows how much there is to do."""

from functools import lru_cache

import torch

_PER_PROCESSOR = 4


@lru_cache(maxsize=8)
def num_programs(device: torch.device) -> int:
    """Enough to fill the GPU; each takes its share of the work."""
    if device.type == "cpu":  # interpreted
        return 3
    return _PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
