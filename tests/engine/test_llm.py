"""The offline class: section 3 of the interface."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from demo.random_checkpoint import CheckpointSpec
from engine import LLM, SamplingParams
from engine.multimodal import ImageFeatureData, ImagePixelData
from tests.conftest import MakeCheckpoint
from tests.oracle import hf_generate, hf_logits, hf_model, pixel_values

SPEC = CheckpointSpec(seed=2, num_key_value_heads=2)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
QUESTION = "<image>\nUSER: What is the content of this image?\nASSISTANT:"
SIZE = SPEC.image_tokens


@pytest.fixture(scope="module")
def folder(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint(SPEC)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32", device="cpu", max_model_len=256) as made:
        yield made


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_the_page_of_old(folder: Path, photos: list[Image.Image]) -> None:
    llm = LLM(
        model=str(folder),
        image_input_type="pixel_values",
        image_token_id=700,
        image_input_shape="1,3,56,56",
        image_feature_size=SIZE,
        dtype="float32",
        device="cpu",
    )
    prompt = "<image>" * SIZE + "\nUSER: What is the content of this image?\nASSISTANT:"
    outputs = llm.generate({"prompt": prompt, "multi_modal_data": ImagePixelData(photos[0])}, GREEDY)
    output = outputs[0]
    assert output.prompt == prompt
    assert output.finished
    assert output.outputs[0].token_ids == hf_generate(folder, output.prompt_token_ids, photos[:1], 12)
    assert output.outputs[0].finish_reason == "length"
    assert output.outputs[0].text
    assert output.metrics.arrival_time <= output.metrics.first_token_time <= output.metrics.finished_time


def test_one_placeholder_is_expanded(llm: LLM, photos: list[Image.Image]) -> None:
    short = llm.generate({"prompt": QUESTION, "multi_modal_data": ImagePixelData(photos[0])}, GREEDY)
    long = llm.generate(
        {"prompt": QUESTION.replace("<image>", "<image>" * SIZE), "multi_modal_data": {"image": photos[0]}}, GREEDY
    )
    assert short[0].prompt_token_ids == long[0].prompt_token_ids
    assert tokens(short) == tokens(long)


def test_every_form_of_the_same_image(llm: LLM, folder: Path, photos: list[Image.Image]) -> None:
    values = pixel_values(folder, photos[:1])
    forms: list[Any] = [
        ImagePixelData(photos[0]),
        ImagePixelData(values),
        ImagePixelData(values.double().numpy()),
        {"image": photos[0]},
        {"image": [photos[0]]},
        {"image": np.asarray(photos[0])},
        {"image": values},
    ]
    outputs = llm.generate([{"prompt": QUESTION, "multi_modal_data": form} for form in forms], GREEDY)
    assert tokens(outputs) == [tokens(outputs)[0]] * len(forms)


def test_features_need_no_tower(folder: Path, llm: LLM, photos: list[Image.Image]) -> None:
    expected = llm.generate({"prompt": QUESTION, "multi_modal_data": ImagePixelData(photos[1])}, GREEDY)
    with torch.inference_mode():
        tower = hf_model(folder).model.vision_tower
        states = tower(pixel_values(folder, photos[1:]), output_hidden_states=True).hidden_states
    features = states[-2][:, 1:]
    blind = LLM(str(folder), image_input_type="image_features", dtype="float32", device="cpu")
    assert not hasattr(blind._core.runner.model, "vision_tower")
    outputs = blind.generate({"prompt": QUESTION, "multi_modal_data": ImageFeatureData(features)}, GREEDY)
    assert tokens(outputs) == tokens(expected)
    with pytest.raises(ValueError, match="ImageFeatureData"):
        blind.generate({"prompt": QUESTION, "multi_modal_data": ImagePixelData(photos[1])})
    with pytest.raises(ValueError, match=r"\(1, 15, 32\).*\(1, 16, 32\)"):
        blind.generate({"prompt": QUESTION, "multi_modal_data": ImageFeatureData(features[:, :15])})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt": "<image><image>", "multi_modal_data": {"image": "PHOTO"}}, "2 image .*1 images.*1 .*or 16"),
        ({"prompt": "no placeholder", "multi_modal_data": {"image": "PHOTO"}}, "0 image .*1 images"),
        ({"prompt": "<image>" * 15, "multi_modal_data": {"image": "PHOTO"}}, "15 image .*16"),
        ({"prompt": "<image>"}, "1 image .*0 images"),
        ({"prompt": "<image>", "multi_modal_data": {"video": "PHOTO"}}, "multi_modal_data"),
        ({"prompt": "<image>", "multi_modal_data": {"image": "a string"}}, "str"),
        ({"prompt": "<image>", "multi_modal_data": {"image": torch.zeros(3, 56, 56)}}, r"\(3, 56, 56\).*\(1, 3, 56, 56\)"),
        ({"prompt": "<image>", "multi_modal_data": {"image": np.zeros((4, 4), np.uint8)}}, r"\(4, 4\)"),
        ({"prompt": "<image>", "multi_modal_data": ImageFeatureData(torch.zeros(1, 16, 32))}, "ImagePixelData"),
        ({"prompt_token_ids": [1, 5000]}, "5000"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt": "x", "promt": "y"}, "promt"),
        ({}, "prompt"),
        ("word " * 300, "context is 256"),
    ],
)  # fmt: skip
def test_bad_prompts_are_refused_before_anything_runs(
    llm: LLM, photos: list[Image.Image], prompt: Any, message: str
) -> None:
    data = prompt.get("multi_modal_data") if isinstance(prompt, dict) else None
    if isinstance(data, dict) and list(map(str, data.values())) == ["PHOTO"]:
        prompt = {**prompt, "multi_modal_data": dict.fromkeys(data, photos[0])}
    with pytest.raises(ValueError, match=message):
        llm.generate(["Hello", prompt], GREEDY)
    assert not llm._core.has_work
    assert not llm._outputs._answers


def test_parameters_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (3, 1, 7)]
    outputs = llm.generate(["Hello", "You", "They"], params, use_tqdm=False)
    assert [len(ids) for ids in tokens(outputs)] == [3, 1, 7]
    assert [output.prompt for output in outputs] == ["Hello", "You", "They"]
    with pytest.raises(ValueError, match="3 prompts.*2 sampling"):
        llm.generate(["Hello", "You", "They"], params[:2])


def test_progress_bar(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate("Hello", GREEDY)
    assert "tok/s" in capfd.readouterr().err
    llm.generate("Hello", GREEDY, use_tqdm=False)
    assert not capfd.readouterr().err


def test_several_answers_and_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=10)
    alone = llm.generate("Hello", params)[0]
    among = llm.generate(["You", "Hello", "They"], [GREEDY, params, GREEDY])[1]
    assert [answer.token_ids for answer in alone.outputs] == [answer.token_ids for answer in among.outputs]
    assert len({tuple(answer.token_ids) for answer in alone.outputs}) == 3
    assert [answer.index for answer in alone.outputs] == [0, 1, 2]
    free = SamplingParams(temperature=1.0, max_tokens=10)
    assert tokens(llm.generate("Hello", free)) != tokens(llm.generate("Hello", free))


def test_stop_strings_and_ids(llm: LLM) -> None:
    text = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
    stop = text.text[6:9]
    cut = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20, stop=stop))[0].outputs[0]
    assert cut.text == text.text[: text.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = SamplingParams(temperature=0, max_tokens=20, stop=[stop], include_stop_str_in_output=True)
    assert llm.generate("Hello", kept)[0].outputs[0].text == cut.text + stop
    token = text.token_ids[4]
    ended = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[token]))[0].outputs[0]
    assert ended.token_ids == text.token_ids[: text.token_ids.index(token) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)


def test_end_of_sequence(checkpoint: MakeCheckpoint, folder: Path) -> None:
    ids = LLM(str(folder), dtype="float32", device="cpu").generate("Hello", GREEDY)[0].outputs[0].token_ids
    ending = LLM(
        str(checkpoint(CheckpointSpec(seed=2, num_key_value_heads=2, eos_token_id=(2, ids[5])))), dtype="float32"
    )
    output = ending.generate("Hello", GREEDY)[0].outputs[0]
    assert output.token_ids == ids[: ids.index(ids[5]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    going_on = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    assert tokens(ending.generate("Hello", going_on)) == [ids]
    later = SamplingParams(temperature=0, max_tokens=12, min_tokens=8)
    assert len(tokens(ending.generate("Hello", later))[0]) >= 8


def test_logprobs_equal_hugging_face(llm: LLM, folder: Path, photos: list[Image.Image]) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2)
    output = llm.generate({"prompt": QUESTION, "multi_modal_data": {"image": photos[0]}}, params)[0]
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    expected = hf_logits(folder, ids, photos[:1]).log_softmax(-1)
    found = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
    assert found[0] is None
    assert len(found) == len(ids)
    for position, table in enumerate(found[1:], start=1):
        assert table is not None
        row = expected[position - 1]
        assert ids[position] in table
        for token, entry in table.items():
            assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        above, near = (int((row > row[ids[position]] + gap).sum()) + 1 for gap in (1e-4, -1e-4))
        assert above <= table[ids[position]].rank <= near
    joined = "".join(table[token].decoded_token for token, table in zip(ids[-6:], found[-6:], strict=True) if table)
    assert joined == output.outputs[0].text
    total = sum(expected[len(output.prompt_token_ids) - 1 + i][token].item() for i, token in enumerate(ids[-6:]))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total, abs=1e-2)


def test_answers_end_where_the_context_does(llm: LLM) -> None:
    output = llm.generate({"prompt_token_ids": [1] * 250}, SamplingParams(max_tokens=100, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"


def test_chat(llm: LLM, photos: list[Image.Image], photo_files: list[Path]) -> None:
    data = "data:image/jpeg;base64," + base64.b64encode(photo_files[0].read_bytes()).decode()
    sources: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "image_url", "image_url": {"url": str(photo_files[0])}},
        {"type": "image_url", "image_url": {"url": f"file://{photo_files[0]}"}},
        {"type": "image", "image": photos[0]},
    ]
    text = {"type": "text", "text": "What is it?"}
    outputs = llm.chat([[{"role": "user", "content": [text, source]}] for source in sources], GREEDY)
    assert tokens(outputs) == [tokens(outputs)[0]] * 4
    single = llm.chat([{"role": "user", "content": "Hello"}], GREEDY)
    assert single[0].prompt == "USER: Hello ASSISTANT:"
    with pytest.raises(ValueError, match="<image>"):
        llm.chat([{"role": "user", "content": "<image>"}])
    with pytest.raises(ValueError, match="cannot be read"):
        llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/no/such/file"}}]}])


def test_arguments_are_checked(folder: Path, checkpoint: MakeCheckpoint) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"modle": 1}, "modle"),
        ({"image_token_id": 5}, "5.*700"),
        ({"image_feature_size": 576}, "576.*16"),
        ({"image_input_shape": "1,3,336,336"}, "1,3,336,336.*1,3,56,56"),
        ({"image_input_shape": "big"}, "1,3,336,336"),
        ({"image_input_type": "pixels"}, "pixel_values"),
        ({"max_model_len": 4096}, "4096.*2048"),
        ({"dtype": "int8"}, "float16"),
        ({"tensor_parallel_size": 2}, "only 1"),
        ({"kv_cache_dtype": "fp8"}, "not available"),
        ({"block_size": 5}, "multiple of 16"),
        ({"gpu_memory_utilization": 1.5}, "1.5"),
        ({"limit_mm_per_prompt": "audio=1"}, "image=4"),
        ({"num_gpu_blocks_override": 5, "kv_cache_memory_bytes": 5}, "exclude"),
        ({"disable_image_processor": True, "image_processor": "x"}, "exclude"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            LLM(str(folder), device="cpu", **arguments)
    with pytest.raises(ValueError, match="text-only"):
        LLM(str(checkpoint(CheckpointSpec(kind="llama"))), image_input_type="pixel_values")


def test_text_only_model_takes_no_images(checkpoint: MakeCheckpoint, photos: list[Image.Image]) -> None:
    llm = LLM(str(checkpoint(CheckpointSpec(kind="llama"))), dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="takes no images"):
        llm.generate({"prompt": "Hello", "multi_modal_data": {"image": photos[0]}})


def test_image_limits_and_disabled_processor(folder: Path, photos: list[Image.Image]) -> None:
    llm = LLM(
        str(folder), limit_mm_per_prompt={"image": 1}, disable_image_processor=True, dtype="float32", device="cpu"
    )
    with pytest.raises(ValueError, match=r"2 images: at most 1"):
        values = pixel_values(folder, photos)
        llm.generate({"prompt": "<image><image>", "multi_modal_data": {"image": [values[:1], values[1:]]}})
    with pytest.raises(ValueError, match="image processor is disabled"):
        llm.generate({"prompt": QUESTION, "multi_modal_data": {"image": photos[0]}})
    output = llm.generate({"prompt": QUESTION, "multi_modal_data": {"image": pixel_values(folder, photos[:1])}}, GREEDY)
    assert tokens(output)[0] == hf_generate(folder, output[0].prompt_token_ids, photos[:1], 12)


def test_context_shrinks_to_the_cache(folder: Path) -> None:
    llm = LLM(str(folder), num_gpu_blocks_override=4, dtype="float32", device="cpu")
    output = llm.generate("Hello", SamplingParams(max_tokens=2000, ignore_eos=True))[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 64
    with pytest.raises(ValueError, match="context is 64"):
        llm.generate({"prompt_token_ids": [1] * 64})
