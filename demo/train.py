"""Trains the demo model from nothing and writes its checkpoint.

    python -m demo.train --out DIR

Beside the answers the vision tower learns what each patch shows, which the generator knows: that teaches it to see in
a fraction of the time. The two linear layers that this takes are thrown away.
"""

import argparse
import collections
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, LlavaForConditionalGeneration

from demo.batches import Batch, Examples, Rows, join
from demo.checkpoint import llava_config, preprocessor_config, write_configs, write_tokenizer, write_weights
from demo.checkpoint_spec import CheckpointSpec
from demo.dialogue import BASE_VOCAB, VOCAB_SIZE, build_tokenizer
from demo.drawing import NUM_CLASSES
from demo.phrases import TOPICS
from demo.world import COLOURS
from engine.image_processor import ImageProcessor

SPEC = CheckpointSpec(
    base_vocab=BASE_VOCAB, vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=2048,
    vision_hidden_size=256, vision_layers=8, vision_heads=4, image_size=288, patch_size=16, vision_feature_layer=-1,
    pads_images=True, dtype="float32", layout="new", greedy=True, shards=3,
)  # fmt: skip
TEMPLATE = Path(__file__).parent.parent / "templates" / "template_llava.jinja"
EVAL_SEED = 1_000_003
"""Of pictures that are never trained on."""
_PATCH_LOSS = 0.5
_NOTHING_WEIGHT = 0.2
_LOOK_AGAIN = 32
"""Steps after which a picture is shown again, with another conversation."""


class Trainee(nn.Module):
    """The model, and what is added to it for training."""

    levels: Tensor
    """(256, 3) each grey level of each channel, normalized."""
    class_weights: Tensor

    def __init__(self, processor: ImageProcessor) -> None:
        super().__init__()
        config = AutoConfig.for_model(**llava_config(SPEC))
        build: Any = LlavaForConditionalGeneration._from_config
        self.llava = build(config, attn_implementation="sdpa")
        size = SPEC.vision_hidden_size
        self.class_head = nn.Linear(size, NUM_CLASSES)
        self.colour_head = nn.Linear(size, 1 + len(COLOURS))
        levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).expand(256, 1, 3).numpy()
        self.register_buffer("levels", torch.from_numpy(processor.normalize(levels)[:, :, 0]).T.contiguous())
        weights = torch.ones(NUM_CLASSES)
        weights[0] = _NOTHING_WEIGHT
        self.register_buffer("class_weights", weights)

    def forward(self, look: "Look") -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the answers, that of the patches, and for each token of an answer whether it was foreseen."""
        channels = torch.arange(3, device=look.pixels.device)
        inputs = self.levels[look.pixels.int(), channels].permute(0, 3, 1, 2)
        model = self.llava.model
        seen = model.vision_tower(inputs).last_hidden_state[:, 1:]
        rows = look.rows
        ids = rows.ids.long()
        embedded = model.language_model.embed_tokens(ids)
        features = model.multi_modal_projector(seen).to(embedded.dtype).flatten(0, 1)
        embedded = embedded.flatten(0, 1).index_copy(0, rows.images, features).view_as(embedded)
        hidden = model.language_model(
            inputs_embeds=embedded,
            attention_mask=attention_mask(rows.talks, features.dtype),
            position_ids=rows.positions.long(),
            use_cache=False,
        ).last_hidden_state
        wanted = ids.flatten()[rows.answers]
        logits = F.linear(hidden.flatten(0, 1)[rows.answers - 1], model.language_model.embed_tokens.weight).float()
        loss = F.cross_entropy(logits, wanted)
        patch_loss = self._patch_loss(seen, look.patches)
        return loss, patch_loss, logits.detach().argmax(-1) == wanted

    def _patch_loss(self, seen: Tensor, patches: Tensor) -> Tensor:
        what, colour = patches.long().unbind(1)
        classes = F.cross_entropy(self.class_head(seen).float().flatten(0, 1), what.flatten(), self.class_weights)
        colours = F.cross_entropy(
            self.colour_head(seen).float().flatten(0, 1), colour.flatten(), self.class_weights[: 1 + len(COLOURS)]
        )
        return classes + colours


class Look(NamedTuple):
    """What `Trainee` takes: pictures, and rows of which the first ones are about them."""

    pixels: Tensor
    patches: Tensor
    rows: Rows


def first_look(batch: Batch) -> Look:
    """The first rows about a batch's pictures."""
    return Look(batch.pixels, batch.patches, batch.looks[0])


def mixed_look(new: Batch, old: Batch) -> Look:
    """New pictures with their first rows, old ones with their last, and rows without pictures."""
    rows = join((new.looks[0], old.looks[-1], new.chats))
    return Look(torch.cat((new.pixels, old.pixels)), torch.cat((new.patches, old.patches)), rows)


def attention_mask(talks: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, 1, tokens, tokens) to be added to scores: a conversation sees itself and the beginning, and no other."""
    length = talks.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=talks.device).tril()
    visible = earlier & ((talks[:, None] == talks[:, :, None]) | (talks[:, None] == 0))
    mask = torch.zeros(visible.shape, dtype=dtype, device=talks.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch, or a part of one, with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    parts = [to_device(part, device) for part in batch]
    return parts if isinstance(batch, list) else type(batch)(*parts)


def make_optimizer(model: nn.Module, device: torch.device, rate: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), fused=device.type == "cuda")


def compile_layers(model: Trainee) -> None:
    """Compile each layer by itself: all of a kind share the result, so that it takes seconds."""
    torch._dynamo.config.cache_size_limit = 64
    for kind in ("CLIPEncoderLayer", "LlamaDecoderLayer"):
        for module in model.modules():
            if type(module).__name__ == kind:
                module.compile(dynamic=False)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to almost nothing."""
    warm = min(1.0, (step + 1) / max(1, min(300, steps // 10)))
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def load(seed: int, num_batches: int, args: argparse.Namespace, processor: ImageProcessor) -> DataLoader[Batch]:
    """Batches of a seed, made ahead of their use."""
    examples = Examples(seed, args.pictures, num_batches, build_tokenizer(), processor, SPEC.patch_size)
    return DataLoader(
        examples, batch_size=None, shuffle=False, num_workers=args.workers, pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if args.workers else None,
    )  # fmt: skip


def train(model: Trainee, args: argparse.Namespace, processor: ImageProcessor, device: torch.device) -> None:
    """Train for `args.steps` steps."""
    optimizer = make_optimizer(model, device, args.rate)
    seen: collections.deque[Batch] = collections.deque(maxlen=1 + _LOOK_AGAIN)
    losses: collections.deque[tuple[Tensor, Tensor, Tensor]] = collections.deque(maxlen=args.report)
    with tqdm(load(args.seed, args.steps, args, processor), desc="Training", unit="step", disable=None) as progress:
        for step, batch in enumerate(progress):
            seen.append(to_device(batch, device))
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, args.steps, args.rate)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, patch_loss, right = model(mixed_look(seen[-1], seen[0]))
            (loss + _PATCH_LOSS * patch_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append((loss.detach(), patch_loss.detach(), right.float().mean()))
            if (step + 1) % args.report == 0:
                means = [torch.stack(part).mean().item() for part in zip(*losses, strict=True)]
                progress.write(f"step {step + 1}: loss {means[0]:.4f}, patches {means[1]:.4f}, tokens {means[2]:.2%}")


@torch.inference_mode()
def accuracies(
    model: Trainee, args: argparse.Namespace, processor: ImageProcessor, device: torch.device
) -> dict[str, tuple[int, int]]:
    """For each topic the answers that greedy decoding gets right to the letter, and all of them, on new pictures.

    A greedy answer is right just when each of its tokens is the likeliest behind the right ones before it, so that
    nothing need be generated.
    """
    counts = dict.fromkeys(TOPICS, (0, 0))
    for batch in tqdm(load(EVAL_SEED, args.eval_batches, args, processor), desc="Measuring", disable=None):
        look = first_look(to_device(batch, device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            right = model(look)[2]
        turns = look.rows.turns
        wrong = torch.zeros_like(turns, dtype=torch.bool)
        wrong.view(-1)[look.rows.answers] = ~right
        for number in range(int(turns.max()) + 1):
            here = turns == number
            for row in here.any(1).nonzero().flatten().tolist():
                topic = TOPICS[int(look.rows.topics[row, number])]
                good, total = counts[topic]
                counts[topic] = good + (not wrong[row][here[row]].any().item()), total + 1
    return counts


def save(model: Trainee, folder: Path) -> None:
    """Write the checkpoint, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    write_configs(folder, SPEC)
    write_tokenizer(folder, SPEC, build_tokenizer(), TEMPLATE.read_text(encoding="utf-8"))
    tensors = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in model.llava.state_dict().items()
        if name != "lm_head.weight"
    }
    write_weights(folder, tensors, SPEC.shards)


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and pictures (default: 0)")
    parser.add_argument("--steps", type=int, default=10500, help="steps (default: 10500)")
    parser.add_argument("--pictures", type=int, default=60, help="new pictures in a step (default: 60)")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="highest learning rate (default: 0.0012)")
    parser.add_argument("--workers", type=int, default=15, help="processes that make pictures (default: 15)")
    parser.add_argument("--eval-batches", type=int, default=60, help="batches to measure with (default: 60)")
    parser.add_argument("--report", type=int, default=100, help="steps between two lines of output (default: 100)")
    args = parser.parse_args()
    started = time.monotonic()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in any order
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = ImageProcessor.from_dict(preprocessor_config(SPEC))
    torch.manual_seed(args.seed)
    model = Trainee(processor).to(device)
    if device.type == "cuda":
        compile_layers(model)
    train(model, args, processor, device)
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    save(model, args.out)
    for topic, (good, total) in accuracies(model, args, processor, device).items():
        print(f"{topic:10} {good / max(1, total):7.2%} of {total}", flush=True)
    print(f"trained, saved and measured in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
