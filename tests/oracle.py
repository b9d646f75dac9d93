"""Hugging Face transformers as the oracle: float32 on the CPU, one sequence at a time."""

import copy
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
    """The checkpoint as Hugging Face loads it, without the generation settings that it names.

    `generate` fills every setting left at None from the model's own, an end of text that is to be ignored too.
    """
    config = AutoConfig.from_pretrained(folder)
    kind: Any = LlavaForConditionalGeneration if config.model_type == "llava" else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config = _generation_config()
    return model


def _generation_config(**settings: Any) -> GenerationConfig:
    kind: Any = GenerationConfig
    config: GenerationConfig = kind(do_sample=False, num_beams=1, pad_token_id=0, **settings)
    return config


def _fresh_model(folder: Path) -> Any:
    # Dynamic rope remembers the longest text that a model has met, which would tie an answer to earlier calls.
    return copy.deepcopy(hf_model(folder))


def pixel_values(folder: Path, images: Sequence[Image.Image]) -> Tensor:
    """(images, 3, height, width) as the checkpoint's own processor makes them."""
    pixels: Tensor = CLIPImageProcessorPil.from_pretrained(folder)(list(images), return_tensors="pt")["pixel_values"]
    return pixels


def _image_inputs(folder: Path, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    return {"pixel_values": pixel_values(folder, images)} if images else {}


def _greedy(
    folder: Path,
    prompt_token_ids: Sequence[int],
    images: Sequence[Image.Image],
    max_new_tokens: int,
    eos_token_id: int | list[int] | None,
) -> Any:
    ids = torch.tensor([list(prompt_token_ids)])
    config = _generation_config(
        max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, output_logits=True, return_dict_in_generate=True
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_image_inputs(folder, images)}
    with torch.inference_mode():
        return _fresh_model(folder).generate(**inputs, generation_config=config)


def hf_generate(
    folder: Path,
    prompt_token_ids: Sequence[int],
    images: Sequence[Image.Image] = (),
    max_new_tokens: int = 16,
    *,
    eos_token_id: int | list[int] | None = None,
    ignore_eos: bool = False,
) -> list[int]:
    """Greedy continuation; `prompt_token_ids` hold each image's tokens in full.

    It ends after an `eos_token_id`, by default the checkpoint's; `ignore_eos` is stronger than either.
    """
    if ignore_eos:
        eos_token_id = None
    elif eos_token_id is None:
        eos_token_id = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    output = _greedy(folder, prompt_token_ids, images, max_new_tokens, eos_token_id)
    new: list[int] = output.sequences[0, len(prompt_token_ids) :].tolist()
    return new


def hf_margins(
    folder: Path, prompt_token_ids: Sequence[int], images: Sequence[Image.Image] = (), max_new_tokens: int = 16
) -> list[float]:
    """How far each greedy token's logit is above the second best; says whether a mismatch is but a near tie."""
    output = _greedy(folder, prompt_token_ids, images, max_new_tokens, None)
    best = torch.cat(output.logits).topk(2).values
    margins: list[float] = (best[:, 0] - best[:, 1]).tolist()
    return margins


def hf_logits(folder: Path, token_ids: Sequence[int], images: Sequence[Image.Image] = ()) -> Tensor:
    """(tokens, vocabulary) float32."""
    with torch.inference_mode():
        output = _fresh_model(folder)(input_ids=torch.tensor([list(token_ids)]), **_image_inputs(folder, images))
    logits: Tensor = output.logits[0].float()
    return logits


def _template(folder: Path) -> str | None:
    """That of chat_template.json, which only processors read; None leaves it to the tokenizer."""
    file = folder / "chat_template.json"
    return str(json.loads(file.read_text())["chat_template"]) if file.exists() else None


def hf_prompt_ids(folder: Path, messages: list[dict[str, Any]]) -> list[int]:
    """A conversation rendered by the checkpoint's template, with one BOS and every image's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        messages, chat_template=_template(folder), tokenize=False, add_generation_prompt=True
    )
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
