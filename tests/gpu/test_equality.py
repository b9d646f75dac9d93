"""The engine on the GPU in float32 gives Hugging Face's tokens, which are computed on the CPU."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from engine import LLM, SamplingParams
from engine.step import SchedulerOutput
from engine.worker.input_batch import InputBatch, StepLayout
from tests.conftest import MakeCheckpoint
from tests.oracle import hf_generate
from tests.random_checkpoint import CheckpointSpec

triton_ops = pytest.importorskip("engine.kernels.triton_ops", exc_type=ImportError)

SPECS = {
    "mha": CheckpointSpec(seed=1),
    "gqa": CheckpointSpec(seed=2, num_key_value_heads=2),
    "mqa, head of 32": CheckpointSpec(seed=3, num_key_value_heads=1, head_dim=32),
    "window": CheckpointSpec(seed=4, text_model="mistral", num_key_value_heads=2, sliding_window=24),
    "head of 80": CheckpointSpec(seed=5, hidden_size=160, num_attention_heads=2, num_key_value_heads=2, head_dim=80),
    "text": CheckpointSpec(seed=6, kind="llama"),
}
# As wide as the kernels for few rows want them.
WIDE = {
    dtype: CheckpointSpec(
        seed=7, kind="llama", hidden_size=1024, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8,
        head_dim=128, dtype=dtype,
    )
    for dtype in ("bfloat16", "float16")
}  # fmt: skip
# Small enough for several tests to share a GPU.
ROOMY = {"kv_cache_memory_bytes": 1 << 28, "max_num_seqs": 48}
LIMITS: dict[str, dict[str, Any]] = {
    "roomy": ROOMY,
    "tiny chunks": {"max_num_batched_tokens": 7, **ROOMY},
    "no graphs": {"enforce_eager": True, **ROOMY},
    "few blocks": {"num_gpu_blocks_override": 24, "max_num_seqs": 16},
    "no prefix cache": {"enable_prefix_caching": False, **ROOMY},
}


def prompts(photos: list[Image.Image], *, sees: bool) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for number in range(24):
        images = [
            photos[(number + i) % 2].crop((0, 0, 200 + 8 * number, 300)) for i in range(number % 4 if sees else 0)
        ]
        text = "USER: " + "<image>\n" * len(images) + f"What is number {number}? " * (1 + number % 5) + "ASSISTANT:"
        made.append({"prompt": text, "multi_modal_data": {"image": images}})
    return made


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("kind", SPECS)
def test_mixed_batch_equals_hugging_face(
    kind: str, limits: str, checkpoint: MakeCheckpoint, photos: list[Image.Image]
) -> None:
    folder = checkpoint(SPECS[kind])
    given = prompts(photos, sees=SPECS[kind].kind == "llava")
    llm = LLM(str(folder), dtype="float32", device="cuda", **LIMITS[limits])
    for _ in range(2):  # the second time prefixes are cached
        outputs = llm.generate(given, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
        for prompt, output in zip(given, outputs, strict=True):
            expected = hf_generate(folder, output.prompt_token_ids, prompt["multi_modal_data"]["image"], 20)
            assert output.outputs[0].token_ids == expected
        llm._core.check_integrity()
    preempted = llm._core.scheduler.num_preemptions > 0
    assert preempted == (limits == "few blocks")


def test_overlapped_steps_change_no_token(checkpoint: MakeCheckpoint, photos: list[Image.Image]) -> None:
    """Two steps on their way at a time, and one."""
    folder, given = checkpoint(SPECS["gqa"]), prompts(photos, sees=True)
    llm = LLM(str(folder), dtype="float32", device="cuda", enable_prefix_caching=False, **ROOMY)
    params = [SamplingParams(temperature=number % 2, seed=number, max_tokens=20) for number in range(len(given))]
    found = []
    for depth in (2, 1, 2):
        llm._core._depth = depth
        outputs = llm.generate(given, params, use_tqdm=False)
        found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("thin", [True, False], ids=["thin products", "cuBLAS"])
def test_half_precision_is_near_float32(
    thin: bool, dtype: str, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights with few rows a step, which have kernels of their own, and without these."""
    folder = str(checkpoint(WIDE[dtype]))
    texts = [f"USER: What is number {number}? ASSISTANT:" for number in range(20)]
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    with LLM(folder, dtype="float32", device="cuda", **ROOMY) as llm:
        exact = llm.generate(texts, params, use_tqdm=False)
    if not thin:
        monkeypatch.setattr(triton_ops, "linear", torch.nn.functional.linear)
    multiplied: list[int] = []
    monkeypatch.setattr(triton_ops, "row_linear", counted(triton_ops.row_linear, multiplied))
    with LLM(folder, dtype=dtype, device="cuda", **ROOMY) as llm:
        rounded = llm.generate(texts, params, use_tqdm=False)
    assert bool(multiplied) == thin
    differences = []
    for one, other in zip(exact, rounded, strict=True):
        assert one.prompt_logprobs is not None and other.prompt_logprobs is not None
        for token, a, b in zip(
            one.prompt_token_ids[1:], one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True
        ):
            assert a is not None and b is not None
            differences.append(abs(a[token].logprob - b[token].logprob))
    print(f"{dtype}, thin={thin}: {sum(differences) / len(differences):.4f} on average, {max(differences):.3f} at most")
    most = {"bfloat16": 0.1, "float16": 0.02}[dtype]
    assert sum(differences) / len(differences) < most and max(differences) < 20 * most


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return call


@pytest.mark.parametrize("count", [1, 16, 32, 100])
def test_answers_do_not_change_from_run_to_run(count: int, checkpoint: MakeCheckpoint) -> None:
    """Greedy, in half precision, at a fixed batch: every sum is made in the same order every time."""
    texts = [f"USER: Tell me of {number} and {number * 7}. ASSISTANT:" for number in range(count)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    llm = LLM(
        str(checkpoint(WIDE["bfloat16"])), dtype="bfloat16", device="cuda", enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28, max_num_seqs=128,
    )  # fmt: skip
    runs = [llm.generate(texts, params, use_tqdm=False) for _ in range(3)]
    for again in runs[1:]:
        for one, other in zip(runs[0], again, strict=True):
            assert other.outputs[0].token_ids == one.outputs[0].token_ids
            assert other.outputs[0].logprobs == one.outputs[0].logprobs


def test_sampling_is_the_same_in_any_batch(checkpoint: MakeCheckpoint) -> None:
    llm = LLM(str(checkpoint(SPECS["gqa"])), dtype="float32", device="cuda", **ROOMY)
    params = [
        SamplingParams(temperature=0.9, top_p=0.8, top_k=50, seed=5, max_tokens=30, logprobs=3),
        SamplingParams(temperature=1.1, min_p=0.05, seed=6, max_tokens=30, repetition_penalty=1.3, bad_words=["the"]),
        SamplingParams(temperature=0, presence_penalty=1.0, frequency_penalty=0.5, max_tokens=30, prompt_logprobs=2),
        SamplingParams(temperature=1, seed=7, max_tokens=30, allowed_token_ids=list(range(300, 500)), min_tokens=5),
    ]
    alone = [llm.generate("USER: Hello ASSISTANT:", param, use_tqdm=False)[0] for param in params]
    together = llm.generate(["USER: Hello ASSISTANT:"] * 4, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in together]
    assert set(alone[3].outputs[0].token_ids) <= set(range(300, 500))
    assert len(alone[2].prompt_logprobs or []) == len(alone[2].prompt_token_ids)
    assert len(alone[0].outputs[0].logprobs or []) == 30


def test_graphs_and_padding_change_no_token(checkpoint: MakeCheckpoint) -> None:
    """Every batch size up to one above the largest that is captured exactly."""
    folder = str(checkpoint(SPECS["gqa"]))
    params = SamplingParams(temperature=0, max_tokens=6)
    prompts = [f"USER: What is number {number}? ASSISTANT:" for number in range(41)]
    eager = LLM(folder, dtype="float32", device="cuda", enforce_eager=True, **ROOMY)
    expected = [output.outputs[0].token_ids for output in eager.generate(prompts, params, use_tqdm=False)]
    graphed = LLM(folder, dtype="float32", device="cuda", **ROOMY)
    assert graphed._core.runner._decodes is not None
    for count in (*range(1, 20), 31, 32, 33, 41):
        outputs = graphed.generate(prompts[:count], params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected[:count]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_and_repeats(dtype: str, checkpoint: MakeCheckpoint) -> None:
    """Log probabilities of the first token stay near those of float32, and greedy tokens are the same each time."""
    folder = str(checkpoint(SPECS["gqa"]))
    prompts = [f"USER: What is number {number}? ASSISTANT:" for number in range(20)]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=3)
    runs = []
    for kind in ("float32", dtype):
        llm = LLM(folder, dtype=kind, device="cuda", **ROOMY)
        runs += [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
    exact, _, first, second = runs
    assert [o.outputs[0].token_ids for o in first] == [o.outputs[0].token_ids for o in second]
    for one, other in zip(exact, first, strict=True):
        wide, narrow = (output.outputs[0].logprobs[0] for output in (one, other))  # type: ignore[index]
        for token in wide.keys() & narrow.keys():
            assert abs(wide[token].logprob - narrow[token].logprob) < (0.4 if dtype == "bfloat16" else 0.05)


@pytest.mark.parametrize("limits", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 40}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_fp8_cache_is_close_and_repeats(dtype: str, limits: dict[str, Any], checkpoint: MakeCheckpoint) -> None:
    """Log probabilities of prompts stay near those of an exact cache; greedy tokens are always the same."""
    folder = str(checkpoint(SPECS["gqa"]))
    prompts = [f"USER: What is number {number}? ASSISTANT:" for number in range(20)]
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0)
    exact = LLM(folder, dtype=dtype, device="cuda", **ROOMY).generate(prompts, params, use_tqdm=False)
    llm = LLM(folder, dtype=dtype, device="cuda", kv_cache_dtype="fp8", **ROOMY, **limits)
    first, second = (llm.generate(prompts, params, use_tqdm=False) for _ in range(2))
    assert [o.outputs[0].token_ids for o in first] == [o.outputs[0].token_ids for o in second]
    differences = []
    for one, other in zip(exact, first, strict=True):
        tables = zip(one.prompt_logprobs or [], other.prompt_logprobs or [], strict=True)
        pairs = zip(one.prompt_token_ids, tables, strict=True)
        differences += [abs(a[token].logprob - b[token].logprob) for token, (a, b) in pairs if a and b]
    # These random models are sharp: one digit of a key moves a log probability far.
    assert 0 < sum(differences) / len(differences) < 0.4


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 40}], ids=str)
@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_shared_beginnings_give_the_same_tokens(
    name: str, limits: dict[str, int], checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with nothing but such requests, and steps in which prompts are computed beside them."""
    shared: list[tuple[int, int]] = []
    lay_out = InputBatch.lay_out

    def watched(self: InputBatch, step: SchedulerOutput) -> StepLayout:
        layout = lay_out(self, step)
        shared.append((layout.shared[0], len(layout.parts) - layout.num_decodes))
        return layout

    monkeypatch.setattr(InputBatch, "lay_out", watched)
    folder = checkpoint(SPECS[name])
    llm = LLM(str(folder), dtype="float32", device="cuda", **ROOMY, **limits)
    beginning = "USER: " + "Look at all of it. " * 40
    prompts = [f"{beginning}What is number {i}? ASSISTANT:" for i in range(14)]
    llm.generate(prompts[0], SamplingParams(max_tokens=1), use_tqdm=False)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    for output in outputs:
        assert output.outputs[0].token_ids == hf_generate(folder, output.prompt_token_ids, [], 24)
    assert any(members >= 8 and not prefills for members, prefills in shared)
    assert any(members >= 8 and prefills for members, prefills in shared) == bool(limits)


@pytest.mark.parametrize("limits", [{"max_model_len": 100}, {"max_model_len": 65, "max_num_batched_tokens": 131}])
def test_contexts_shorter_than_a_step(limits: dict[str, int], checkpoint: MakeCheckpoint) -> None:
    llm = LLM(str(checkpoint(SPECS["gqa"])), dtype="float32", device="cuda", **ROOMY, **limits)
    (output,) = llm.generate("USER: Hello ASSISTANT:", SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert output.outputs[0].token_ids == hf_generate(checkpoint(SPECS["gqa"]), output.prompt_token_ids, [], 20)


def test_a_closed_engine_gives_its_memory_back(checkpoint: MakeCheckpoint) -> None:
    import torch

    def allocated_while_open() -> int:
        with LLM(str(checkpoint(SPECS["gqa"])), dtype="float32", device="cuda", **ROOMY) as llm:
            llm.generate("USER: Hello ASSISTANT:", SamplingParams(max_tokens=3), use_tqdm=False)
            return torch.cuda.memory_allocated()

    allocated_while_open()  # what libraries keep for ever is there from now on
    gc.collect()
    before = torch.cuda.memory_allocated()
    assert allocated_while_open() > before + (32 << 20)
    assert torch.cuda.memory_allocated() < before + (8 << 20)
