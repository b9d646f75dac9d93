"""The tensors that hold keys and values, one a layer."""

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.models.llama import head_dim


def make_caches(config: EngineConfig, num_blocks: int, dtype: torch.dtype) -> list[Tensor]:
    """As `AttentionBackend` wants them."""
    text = config.text_config
    shape = (2, num_blocks, config.block_size, text.num_key_value_heads, head_dim(text))
    return [torch.zeros(shape, dtype=dtype, device=config.device) for _ in range(text.num_hidden_layers)]


def block_bytes(config: EngineConfig) -> int:
    """Of one block in all layers."""
    text = config.text_config
    numbers = 2 * config.block_size * text.num_key_value_heads * head_dim(text)
    return int(text.num_hidden_layers * numbers * config.kv_cache_dtype.itemsize)
