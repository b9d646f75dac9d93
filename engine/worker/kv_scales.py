"""What an fp8 KV cache divides keys and values by, found by running the model once."""

import numpy as np
import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.models.llama import LlamaForCausalLM
from engine.models.llava import LlavaForConditionalGeneration
from engine.worker.input_batch import InputBatch
from engine.worker.layer_caches import make_caches

_FIRST_CAPABILITY = (8, 9)
_TOKENS = 512
_TOKENS_BEFORE_PICTURE = 32
_HEADROOM = 8
"""Times as large as any that was seen a number may be before it is cut off. e4m3 has three binary digits whatever a
number's size, so that this costs none.
"""
_LEAST = 2.0**-20


def check_fp8(device: torch.device) -> None:
    """Refuse a GPU that cannot convert e4m3.

    Raises:
        ModelLoadError: it is one.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ModelLoadError(f"--kv-cache-dtype fp8 needs a GPU of compute capability 8.9 or more: {name} is older")


def find_kv_scales(model: LlamaForCausalLM, config: EngineConfig, batch: InputBatch) -> list[Tensor]:
    """Each layer's (2, kv_heads): powers of two, which keep the digits of what they divide, and are the same where
    machines differ in the last digit.

    Raises:
        ModelLoadError: the model gives numbers that are none.
    """
    with torch.inference_mode():
        hidden = _embeddings(model, config)[: config.max_model_len]
        blocks = -(-len(hidden) // config.block_size)
        caches = make_caches(config, blocks, config.dtype)
        model.language_model(hidden, caches, _metadata(len(hidden), blocks, batch))
        largest = torch.stack([cache.abs().amax((1, 2, 4)).float() for cache in caches]).cpu()
        if not largest.isfinite().all():
            raise ModelLoadError("--kv-cache-dtype fp8: the model's keys or values are infinite: try another --dtype")
        _, exponent = torch.frexp(largest * (_HEADROOM / torch.finfo(torch.float8_e4m3fn).max))
        scales = torch.ldexp(torch.ones_like(largest), exponent).clamp(min=_LEAST)
        return [of_layer.to(config.device) for of_layer in scales]


def _embeddings(model: LlamaForCausalLM, config: EngineConfig) -> Tensor:
    """(T, hidden) of seeded tokens and, where the model sees, a seeded picture among them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (_TOKENS,), generator=generator)
    first = getattr(config.text_config, "bos_token_id", None)
    if isinstance(first, int) and first < config.vocab_size:  # whose keys and values are unlike all others
        ids[0] = first
    embedded: Tensor = model.language_model.embed_tokens(ids.to(config.device))
    if config.vision is None or not hasattr(model, "vision_tower"):
        return embedded
    assert isinstance(model, LlavaForConditionalGeneration)
    pixels = torch.randn(config.vision.input_shape, generator=generator)
    seen = model.encode(pixels.to(embedded))[0]
    return torch.cat((embedded[:_TOKENS_BEFORE_PICTURE], seen, embedded[_TOKENS_BEFORE_PICTURE:]))


def _metadata(tokens: int, blocks: int, batch: InputBatch) -> AttentionMetadata:
    """Of a prompt of so many tokens in the first blocks."""
    counts = np.array([tokens])
    positions = torch.arange(tokens, dtype=torch.int32, device=batch.device)
    return AttentionMetadata(
        num_decodes=0,
        query_start=[0, tokens],
        seq_lens=[tokens],
        rows=[0],
        token_rows=torch.zeros_like(positions),
        positions=positions,
        rotary_rows=positions,
        block_table=torch.arange(blocks, dtype=torch.int32, device=batch.device).unsqueeze(0),
        prefills=batch.upload(np.array([[0], [tokens], [tokens], [0]], np.int32)),
        tiles=batch.upload(batch.tiles(counts, counts)),
    )
