"""The offline class: section 3 of the interface."""

import base64
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import LLM, SamplingParams
from engine.multimodal import ImageFeatureData, ImagePixelData
from tests.conftest import MakeCheckpoint
from tests.oracle import hf_generate, hf_logits, hf_model, pixel_values
from tests.random_checkpoint import CheckpointSpec

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
        ({"prompt": "<image><image>", "multi_modal_data": {"image": "PHOTO"}}, "2 image .* for 1 image: 1 .*or 16"),
        ({"prompt": "no placeholder", "multi_modal_data": {"image": "PHOTO"}}, "0 image .*1 image:"),
        ({"prompt": "<image>" * 15, "multi_modal_data": {"image": "PHOTO"}}, "15 image .*16"),
        ({"prompt": "<image>"}, "1 image placeholder token, but no image"),
        ({"prompt": "<image>", "multi_modal_data": {"video": "PHOTO"}}, "multi_modal_data"),
        ({"prompt": "<image>", "multi_modal_data": {"image": "a string"}}, "str"),
        ({"prompt": "<image>", "multi_modal_data": {"image": torch.zeros(3, 56, 56)}}, r"\(3, 56, 56\).*\(1, 3, 56"),
        ({"prompt": "<image>", "multi_modal_data": {"image": np.zeros((4, 4, 2), np.uint8)}}, r"\(4, 4, 2\)"),
        ({"prompt": "<image>", "multi_modal_data": ImageFeatureData(torch.zeros(1, 16, 32))}, "ImagePixelData"),
        ({"prompt_token_ids": [1, 5000]}, "5000"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt": "x", "promt": "y"}, "promt"),
        ({}, "prompt"),
        (5, "a prompt is a int"),
        (None, "a prompt is a NoneType"),
        ({"prompt": 5}, "needs `prompt`"),
        ({"prompt_token_ids": "12"}, "prompt_token_ids is a str"),
        ({"prompt_token_ids": 12}, "prompt_token_ids is a int"),
        ({"prompt_token_ids": [1, True]}, "True"),
        ("half of \ud83d", "surrogate pair at character 8"),
        ({"prompt": "<image>", "multi_modal_data": "PHOTO"}, "multi_modal_data"),
        ({"prompt": "<image>", "multi_modal_data": {"image": np.array([None])}}, "ndarray"),
        ({"prompt": "<image>", "multi_modal_data": ImagePixelData(torch.zeros(1, 3, 56, 56).int())}, "int32.*float"),
        ({"prompt": "<image>", "multi_modal_data": {"image": np.zeros((2, 3, 56, 56))}}, r"\(2, 3, 56, 56\)"),
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


def test_prompts_are_cut_from_the_front(llm: LLM) -> None:
    text = "USER: Hello there ASSISTANT:"
    limits = (None, 3, 1000)
    params = [SamplingParams(max_tokens=1, truncate_prompt_tokens=limit) for limit in limits]
    whole, cut, uncut = (output.prompt_token_ids for output in llm.generate([text] * 3, params))
    assert cut == whole[-3:] and uncut == whole
    with pytest.raises(ValueError, match="truncate_prompt_tokens is 0"):
        SamplingParams(truncate_prompt_tokens=0)


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
        ({"block_size": 5}, "multiple of 16"),
        ({"gpu_memory_utilization": 1.5}, "1.5"),
        ({"limit_mm_per_prompt": "audio=1"}, "audio is not served"),
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
    values = pixel_values(folder, photos)
    with pytest.raises(ValueError, match=r"2 images: at most 1"):
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


@pytest.mark.parametrize("inputs", [None, 5, {"a", "b"}])
def test_inputs_that_are_no_list(llm: LLM, inputs: Any) -> None:
    with pytest.raises(ValueError, match="it must be a prompt or a list of prompts"):
        llm.generate(inputs, GREEDY)


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []
    assert llm.generate([], []) == []


@pytest.mark.parametrize("params", [{"temperature": 0}, [{"temperature": 0}], "greedy", [None]])
def test_parameters_of_another_type(llm: LLM, params: Any) -> None:
    with pytest.raises(ValueError, match="must be SamplingParams or a list of them"):
        llm.generate(["Hello"], params)


def test_refused_parameters_leave_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ValueError, match="stop_token_ids holds 9999"):
        llm.generate(["Hello", "You"], [GREEDY, SamplingParams(stop_token_ids=[9999])])
    assert not llm._core.has_work
    assert not llm._outputs._answers


def test_interrupt_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, left = llm._core.step, iter(range(3))

    def interrupted() -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step()

    expected = llm.generate(["Hello", "You"], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(llm._core, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Hello", "You", "They"], GREEDY)
    assert not llm._core.has_work
    assert not llm._outputs._answers
    llm._core.check_integrity()
    assert tokens(llm.generate(["Hello", "You"], GREEDY)) == tokens(expected)


def test_failing_step_is_an_error_and_the_next_call_works(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(llm._core.runner, "execute", fail)
        with pytest.raises(RuntimeError, match="the GPU ran out of memory"):
            llm.generate(["Hello", "You"], GREEDY)
    assert not llm._core.has_work
    assert not llm._outputs._answers
    llm._core.check_integrity()
    assert llm.generate("Hello", GREEDY)[0].finished


def test_token_ids_as_arrays(llm: LLM) -> None:
    ids = [1, 300, 301]
    forms: list[Any] = [ids, tuple(ids), np.array(ids), torch.tensor(ids)]
    outputs = llm.generate([{"prompt_token_ids": form} for form in forms], GREEDY)
    assert tokens(outputs) == [tokens(outputs)[0]] * 4
    assert [output.prompt_token_ids for output in outputs] == [ids] * 4


def test_arrays_of_any_memory_layout(llm: LLM, folder: Path, photos: list[Image.Image]) -> None:
    values = pixel_values(folder, photos[:1]).numpy()
    mirrored = np.ascontiguousarray(values[..., ::-1])
    frozen = values.copy()
    frozen.flags.writeable = False
    forms: list[Any] = [values, mirrored[..., ::-1], frozen, np.asfortranarray(values), torch.from_numpy(values.copy())]
    forms.append(torch.from_numpy(values.copy()).requires_grad_())
    outputs = llm.generate([{"prompt": QUESTION, "multi_modal_data": {"image": form}} for form in forms], GREEDY)
    assert tokens(outputs) == [tokens(outputs)[0]] * len(forms)
    levels = np.asarray(photos[0])
    turned = [np.ascontiguousarray(levels[::-1])[::-1], np.asfortranarray(levels), Image.fromarray(levels)]
    outputs = llm.generate([{"prompt": QUESTION, "multi_modal_data": {"image": form}} for form in turned], GREEDY)
    assert tokens(outputs) == [tokens(outputs)[0]] * 3


def test_sampling_defaults_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.0}))
    llm = LLM(copy, dtype="float32", device="cpu")
    found, again = (tokens(llm.generate("Hello", use_tqdm=False)) for _ in range(2))
    assert found == again == tokens(llm.generate("Hello", SamplingParams(temperature=0), use_tqdm=False))
    assert len(found[0]) == 16


def test_seeds_of_the_engine(folder: Path) -> None:
    free = SamplingParams(temperature=1.0, max_tokens=10)
    texts = ["Hello", "Hello", "You"]
    made = [LLM(folder, dtype="float32", device="cpu", seed=seed) for seed in (1, 1, 2)]
    found = [tokens(llm.generate(texts, free, use_tqdm=False)) for llm in made]
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


@pytest.mark.parametrize("budget", [2048, 7])
def test_features_of_several_layers(budget: int, checkpoint: MakeCheckpoint, photos: list[Image.Image]) -> None:
    spec = CheckpointSpec(seed=5, vision_feature_layer=(-2, 1), vision_feature_select_strategy="full")
    folder = checkpoint(spec)
    with torch.inference_mode():
        tower = hf_model(folder).model.vision_tower
        states = tower(pixel_values(folder, photos), output_hidden_states=True).hidden_states
    features = torch.cat([states[-2], states[1]], dim=-1)
    llm = LLM(folder, image_input_type="image_features", dtype="float32", device="cpu", max_num_batched_tokens=budget)
    given = [ImageFeatureData(features[:1]), ImageFeatureData(features[1:])]
    prompt = {"prompt": "USER: <image><image>\nWhat? ASSISTANT:", "multi_modal_data": {"image": given}}
    outputs = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2)]
    expected = hf_generate(folder, outputs[0].prompt_token_ids, photos, 12)
    assert tokens(outputs) == [expected, expected]
    assert [output.num_cached_tokens > 0 for output in outputs] == [False, True]
    with pytest.raises(ValueError, match=r"\(1, 17, 32\).*\(1, 17, 64\)"):
        llm.generate({"prompt": "<image>", "multi_modal_data": ImageFeatureData(features[:1, :, :32])})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "a conversation is a str"),
        ({"role": "user", "content": "Hello"}, "a conversation is a dict"),
        ([], "empty conversation"),
        ([[]], "empty conversation"),
        ([[{"role": "user", "content": "Hello"}], 5], "a conversation is a int"),
        ([{"role": "user", "content": "Hello"}, 5], "must be a dict with a `role`"),
        ([{"content": "Hello"}], "must be a dict with a `role`"),
        ([{"role": "user", "content": 5}], "content is a int"),
        ([{"role": "user", "content": ["Hello"]}], "type None"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "type 'video'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "string under `text`"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "string under `text`"),
        ([{"role": "user", "content": "<image>"}], "<image>"),
    ],
)
def test_malformed_conversations(llm: LLM, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.chat(messages, GREEDY)
    assert not llm._core.has_work


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "NoneType: it must be a URL, a path or a PIL image"),
        (np.zeros((4, 4, 3), np.uint8), "ndarray: it must be a URL"),
        ("data:image/png;base64,@@@", "data:image/png;base64,@@@ cannot be read"),
        ("data:image/png;base64,aGVsbG8=", "not JPEG, PNG"),
        ("data:image/png,hello", "cannot be read"),
        ("http://127.0.0.1:9/photo.jpg", "cannot be read"),
        ("http://", "cannot be read"),
        ("/no/such\0file", "cannot be read"),
        ("/", "/ cannot be read"),
        ("A" * 100_000, "A{100} cannot be read: File name too long$"),
    ],
)
def test_sources_that_cannot_be_read(llm: LLM, source: Any, message: str) -> None:
    part = {"type": "image_url", "image_url": {"url": source}}
    with pytest.raises(ValueError, match=message) as caught:
        llm.chat([{"role": "user", "content": [part]}], GREEDY)
    assert len(str(caught.value)) < 400
    assert not llm._core.has_work


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("/no/such/file", "neither a template nor a readable file"),
        ("{{ broken( }}", "no valid Jinja: line 1"),
        ("{{ raise_exception('only users') }}", "refuses the messages: only users"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "cannot render the messages: division by zero"),
        ("{{ messages[9]['role'] }}", "has no element 9"),
    ],
)
def test_templates_that_fail(llm: LLM, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.chat([{"role": "user", "content": "Hello"}], GREEDY, chat_template=template)


def test_template_and_its_arguments(llm: LLM, tmp_path: Path) -> None:
    template = "{{ tone }}:{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    (tmp_path / "mine.jinja").write_text(template)
    for given in (template, str(tmp_path / "mine.jinja")):
        arguments: dict[str, Any] = {"chat_template": given, "chat_template_kwargs": {"tone": "kind"}}
        message = {"role": "user", "content": "Hello"}
        assert llm.chat([message], GREEDY, **arguments)[0].prompt == "kind:Hello>"
        assert llm.chat([message], GREEDY, add_generation_prompt=False, **arguments)[0].prompt == "kind:Hello"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/china.jpg")
            self.end_headers()
        else:
            super().do_GET()


@pytest.fixture
def web(photo_files: list[Path]) -> Iterator[str]:
    handler = partial(_Handler, directory=str(photo_files[0].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_chat_with_images_of_a_server(llm: LLM, web: str, photos: list[Image.Image], photo_files: list[Path]) -> None:
    def question(*sources: Any) -> list[dict[str, Any]]:
        shown = [{"type": "image_url", "image_url": {"url": source}} for source in sources]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": "What is it?"}]}]

    china, flower = (f"{web}/{file.name}" for file in photo_files)
    outputs = llm.chat([question(china, flower), question(flower, china), question(f"{web}/moved", flower)], GREEDY)
    files = llm.chat(question(*photo_files), GREEDY)
    first, second, moved = tokens(outputs)
    assert [first] == tokens(files) == [moved]
    assert first != second
    with pytest.raises(ValueError, match="404"):
        llm.chat(question(f"{web}/none.jpg"))


def test_file_address_with_escapes(llm: LLM, photo_files: list[Path], tmp_path: Path) -> None:
    odd = tmp_path / "a photo, 50% #1.jpg"
    shutil.copy(photo_files[0], odd)
    sources = [odd.as_uri(), str(odd), odd]
    outputs = llm.chat(
        [[{"role": "user", "content": [{"type": "image", "image": source}]}] for source in sources], GREEDY
    )
    assert tokens(outputs) == [tokens(outputs)[0]] * 3


def test_images_of_several_turns_keep_their_order(llm: LLM, folder: Path, photos: list[Image.Image]) -> None:
    first, second = ({"type": "image", "image": photo} for photo in photos)
    output = llm.chat(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}, second]},
            {"role": "assistant", "content": "A flower."},
            {"role": "user", "content": [first, {"type": "text", "text": "And this?"}]},
        ],
        GREEDY,
    )[0]
    assert output.prompt_token_ids.count(700) == 2 * SIZE
    assert output.outputs[0].token_ids == hf_generate(folder, output.prompt_token_ids, photos[::-1], 12)


def test_closed_engine_frees_its_model(folder: Path) -> None:
    with LLM(folder, dtype="float32", device="cpu") as llm:
        assert llm.generate("Hello", GREEDY)[0].finished
    assert not hasattr(llm, "_core")


def test_words_that_cannot_be_sampled_need_no_ban(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some checkpoints' tokenizers have tokens that their models have not."""
    params = SamplingParams(bad_words=["Hello"])
    assert llm._inputs.bad_words(params)
    monkeypatch.setattr(llm.config.text_config, "vocab_size", 259)
    assert llm._inputs.bad_words(params) == []
    assert params == SamplingParams(bad_words=["Hello"])


def test_min_tokens_that_do_not_fit(llm: LLM) -> None:
    with pytest.raises(ValueError, match="min_tokens is 4000: at most"):
        llm.generate("USER: Hello ASSISTANT:", SamplingParams(max_tokens=None, min_tokens=4000))
