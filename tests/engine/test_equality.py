"""Greedy float32 output equals Hugging Face's `generate`, token for token, however requests are scheduled."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine import LLM, SamplingParams
from tests.conftest import MakeCheckpoint
from tests.oracle import hf_generate
from tests.random_checkpoint import CheckpointSpec

FACTORS = {"short_factor": [1.0] * 4 + [1.5] * 4, "long_factor": [2.0] * 4 + [3.0] * 4}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": LLAMA3,
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {**FACTORS, "original_max_position_embeddings": 60},
}
SPECS = {
    "mha": CheckpointSpec(seed=1),
    "gqa": CheckpointSpec(seed=2, num_key_value_heads=2),
    "tied": CheckpointSpec(seed=3, tie_word_embeddings=True),
    "biases": CheckpointSpec(seed=21, attention_bias=True, mlp_bias=True, projector_bias=False),
    "feature layers": CheckpointSpec(seed=5, vision_feature_layer=(0, -2, 1), vision_feature_select_strategy="full"),
    "last layer": CheckpointSpec(seed=6, vision_feature_layer=-1),
    "several layers": CheckpointSpec(seed=14, vision_feature_layer=(-2, -1, 1)),
    "mistral": CheckpointSpec(seed=7, text_model="mistral", num_key_value_heads=2, sliding_window=24),
    "head size": CheckpointSpec(seed=8, head_dim=32),
    "new layout": CheckpointSpec(seed=9, layout="new", shards=3),
    "flat layout": CheckpointSpec(seed=10, layout="flat_clip"),
    "text llama": CheckpointSpec(seed=11, kind="llama", num_key_value_heads=1),
    "text mistral": CheckpointSpec(seed=12, kind="mistral", sliding_window=24),
    **{
        f"rope {kind}": CheckpointSpec(
            seed=13, rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **rope}, num_key_value_heads=2
        )
        for kind, rope in ROPES.items()
    },
}
LIMITS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "tiny chunks": {"max_num_batched_tokens": 7},
    "few blocks": {"num_gpu_blocks_override": 24, "max_num_seqs": 16},
    "few blocks and tiny chunks": {"num_gpu_blocks_override": 20, "max_num_batched_tokens": 40},
    "no prefix cache": {"enable_prefix_caching": False},
    "large blocks": {"block_size": 32},
}
GREEDY = SamplingParams(temperature=0, max_tokens=20)
TURN = "What is number {}? "
Key = tuple[Path, tuple[int, ...], tuple[bytes, ...]]
_known: dict[Key, list[int]] = {}


def prompts(photos: list[Image.Image], *, sees: bool, count: int = 24) -> list[dict[str, Any]]:
    """Mixed prompts of up to three images and five sentences, some with earlier turns."""
    made: list[dict[str, Any]] = []
    for number in range(count):
        images = [
            photos[(number + i) % 2].crop((0, 0, 200 + 8 * number, 300)) for i in range(number % 4 if sees else 0)
        ]
        shown = ["<image>\n" for _ in images]
        text = f"USER: {''.join(shown[:1])}{TURN.format(number) * (1 + number % 5)}"
        if number % 3 == 0:
            text += f"ASSISTANT: It is small.</s>USER: {''.join(shown[1:])}And now? "
        else:
            text += "".join(shown[1:])
        made.append({"prompt": text + "ASSISTANT:", "multi_modal_data": {"image": images}})
    return made


def reference(folder: Path, ids: list[int], images: list[Image.Image]) -> list[int]:
    """What Hugging Face generates; asked once for each prompt."""
    key = folder, tuple(ids), tuple(image.tobytes() for image in images)
    if key not in _known:
        _known[key] = hf_generate(folder, ids, images, 20)
    return _known[key]


def check(llm: LLM, folder: Path, given: list[dict[str, Any]], *, together: bool = True) -> list[int]:
    """Compare with the oracle; returns how many prompt tokens each request found cached."""
    batches = [given] if together else [[prompt] for prompt in given]
    outputs = [output for batch in batches for output in llm.generate(batch, GREEDY, use_tqdm=False)]
    for prompt, output in zip(given, outputs, strict=True):
        images = prompt.get("multi_modal_data", {}).get("image", [])
        assert output.outputs[0].token_ids == reference(folder, output.prompt_token_ids, images)
    llm._core.check_integrity()
    return [output.num_cached_tokens for output in outputs]


@pytest.mark.parametrize("kind", SPECS)
def test_every_architecture(kind: str, checkpoint: MakeCheckpoint, photos: list[Image.Image]) -> None:
    folder = checkpoint(SPECS[kind])
    given = prompts(photos, sees=SPECS[kind].kind == "llava", count=8)
    llm = LLM(str(folder), dtype="float32", device="cpu", max_num_batched_tokens=50)
    check(llm, folder, given)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("limits", LIMITS)
def test_every_schedule(
    limits: str,
    depth: int,
    checkpoint: MakeCheckpoint,
    photos: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint(SPECS["gqa"])
    given = prompts(photos, sees=True)
    llm = LLM(str(folder), dtype="float32", device="cpu", **LIMITS[limits])
    monkeypatch.setattr(llm._core, "_depth", depth)
    check(llm, folder, given)
    cached = check(llm, folder, given)
    if not limits.startswith("few blocks"):  # where prefixes live no longer than their request
        assert (max(cached) > 0) == (limits != "no prefix cache")
    assert (llm._core.scheduler.num_preemptions > 0) == limits.startswith("few blocks")


def test_one_at_a_time(checkpoint: MakeCheckpoint, photos: list[Image.Image]) -> None:
    folder = checkpoint(SPECS["mha"])
    check(LLM(str(folder), dtype="float32", device="cpu"), folder, prompts(photos, sees=True), together=False)


def counting(lengths: range) -> list[dict[str, Any]]:
    """Prompts of these lengths that begin alike."""
    return [{"prompt_token_ids": [1, *range(300, 299 + length)]} for length in lengths]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("limits", LIMITS)
def test_longrope_changes_tables_while_it_generates(
    limits: str, depth: int, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below 60 tokens at first, above at the end; or above from the start. Asked twice, for cache hits."""
    folder = checkpoint(SPECS["rope longrope"])
    given = counting(range(38, 62, 2)) + counting(range(59, 75, 3))
    tight = {"num_gpu_blocks_override": 10} if limits.startswith("few blocks") else {}
    llm = LLM(str(folder), dtype="float32", device="cpu", **(LIMITS[limits] | tight))
    monkeypatch.setattr(llm._core, "_depth", depth)
    check(llm, folder, given)
    cached = check(llm, folder, given)
    assert (max(cached) > 0) == (limits != "no prefix cache")
    assert (llm._core.scheduler.num_preemptions > 0) == limits.startswith("few blocks")


@pytest.mark.parametrize("budget", [2048, 7])
@pytest.mark.parametrize("kind", ["gqa", "mistral", "feature layers"])
def test_images_side_by_side_and_twice(
    kind: str, budget: int, checkpoint: MakeCheckpoint, photos: list[Image.Image]
) -> None:
    folder = checkpoint(SPECS[kind])
    a, b = photos
    shown = [("<image><image>What?", [a, b]), ("<image><image>What?", [b, a]), ("<image><image>", [a, a])]
    shown += [("What?<image>And<image><image>", [a, b, a]), ("<image>", [b]), ("What?<image>", [b])]
    given = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images in shown]
    llm = LLM(str(folder), dtype="float32", device="cpu", max_num_batched_tokens=budget)
    check(llm, folder, given)
    check(llm, folder, given, together=False)


@pytest.mark.parametrize("kind", ["llava", "llama", "mistral"])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"type": "longrope", "original_max_position_embeddings": 60, **FACTORS},
        {"rope_type": "llama3", **LLAMA3},
    ],
    ids=lambda scaling: "default" if scaling is None else next(iter(scaling.values())),
)
def test_rope_as_old_configurations_state_it(
    scaling: dict[str, Any] | None, kind: Any, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """`rope_theta` and `rope_scaling` beside each other, as all checkpoints have them that exist."""
    folder = tmp_path / "old"
    shutil.copytree(checkpoint(CheckpointSpec(seed=15, kind=kind)), folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    del text["rope_parameters"]
    text |= {"rope_theta": 5000.0, "rope_scaling": scaling}
    if scaling is not None and "original_max_position_embeddings" in scaling:
        text["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    check(LLM(str(folder), dtype="float32", device="cpu"), folder, counting(range(5, 90, 40)))


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear"}, {"rope_type": "yarn", "original_max_position_embeddings": 64}]
)
def test_beyond_the_length_of_training(rope: dict[str, Any], checkpoint: MakeCheckpoint) -> None:
    parameters = {"rope_theta": 10000.0, "factor": 4.0, **rope}
    folder = checkpoint(CheckpointSpec(seed=16, max_position_embeddings=64, rope_parameters=parameters))
    llm = LLM(str(folder), dtype="float32", device="cpu")
    assert llm.config.max_model_len == 256
    check(llm, folder, counting(range(30, 237, 40)))
