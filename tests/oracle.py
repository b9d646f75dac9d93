"""Hugging Face transformers as the oracle: float32 on the CPU, one sequence at a time."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


@lru_cache(maxsize=2)
def hf_model(folder: Path) -> Any:
    """The checkpoint as Hugging Face loads it."""
    config = AutoConfig.from_pretrained(folder)
    kind = LlavaForConditionalGeneration if config.model_type == "llava" else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def pixel_values(folder: Path, images: Sequence[Image.Image]) -> Tensor:
    """(images, 3, height, width) as the checkpoint's own processor makes them."""
    return CLIPImageProcessorPil.from_pretrained(folder)(list(images), return_tensors="pt")["pixel_values"]


def hf_generate(
    folder: Path,
    prompt_token_ids: Sequence[int],
    images: Sequence[Image.Image] = (),
    max_new_tokens: int = 16,
    *,
    eos_token_id: int | list[int] | None = None,
    ignore_eos: bool = False,
) -> list[int]:
    """Greedy continuation; `prompt_token_ids` hold each image's tokens in full."""
    model = hf_model(folder)
    if eos_token_id is None and not ignore_eos:
        eos_token_id = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    ids = torch.tensor([list(prompt_token_ids)])
    generation = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, pad_token_id=0
    )
    extra = {"pixel_values": pixel_values(folder, images)} if images else {}
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=generation, **extra
        )
    return output[0, ids.shape[1] :].tolist()


def hf_logits(folder: Path, token_ids: Sequence[int], images: Sequence[Image.Image] = ()) -> Tensor:
    """(tokens, vocabulary) float32."""
    extra = {"pixel_values": pixel_values(folder, images)} if images else {}
    with torch.inference_mode():
        return hf_model(folder)(input_ids=torch.tensor([list(token_ids)]), **extra).logits[0].float()


def hf_prompt_ids(folder: Path, messages: list[dict[str, Any]]) -> list[int]:
    """A conversation rendered by the checkpoint's template, with one BOS and every image's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "llava":
        return list(ids)
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    size = patches + (config.vision_feature_select_strategy == "full")
    image = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
    return [token for t in ids for token in [t] * (size if t == image else 1)]
