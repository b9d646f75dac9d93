"""Answers have the form that was asked for, however requests are scheduled, and change nobody else's."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for
from PIL import Image

from engine import LLM, SamplingParams
from engine.outputs import CompletionOutput, RequestOutput
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec

SPEC = CheckpointSpec(seed=2, num_key_value_heads=2)
SCHEMAS = Path(__file__).parents[1] / "data" / "json_schemas.json"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}  # fmt: skip
DATE = r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
COLORS = ["red", "dark red", "blue", "東京"]
GBNF = 'root ::= "(" root ")" | [0-9]{1,2}'
LARK = 'start: WORD ("-" WORD){2}\nWORD: /[a-f]{1,3}/'
FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"json": PERSON}, lambda text: Draft202012Validator(PERSON).is_valid(json.loads(text))),
    ({"regex": DATE}, lambda text: re.fullmatch(DATE, text)),
    ({"choice": COLORS}, lambda text: text in COLORS),
    ({"grammar": GBNF}, lambda text: len(text.strip("()")) < 3 and text.count("(") == text.count(")")),
    ({"grammar": LARK}, lambda text: re.fullmatch(r"[a-f]{1,3}(-[a-f]{1,3}){2}", text)),
]  # fmt: skip
SCHEDULES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "tiny chunks": {"max_num_batched_tokens": 7},
    "few blocks": {"num_gpu_blocks_override": 20, "max_num_seqs": 16},
    "no prefix cache": {"enable_prefix_caching": False},
}
VALUES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 1.5, "top_p": 0.9, "seed": 1},
    {"temperature": 3, "top_k": 5, "seed": 2, "n": 3},
    {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 2, "presence_penalty": 2},
    {"temperature": 1, "min_p": 0.2, "seed": 3, "logit_bias": {300: 100, 301: -100}},
]


@pytest.fixture(scope="module")
def folder(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint(SPEC)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, dtype="float32", device="cpu", max_model_len=256) as made:
        yield made


def answers(outputs: list[RequestOutput]) -> list[CompletionOutput]:
    return [answer for output in outputs for answer in output.outputs]


def mixed(photos: list[Image.Image]) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """Every second request has a form; the others are such as are plain to the sampler, or not."""
    prompts, params = [], []
    for number in range(24):
        images = [photos[number % 2]] if number % 3 == 0 else []
        text = f"USER: {'<image>' * len(images)}{'What is this? ' * (1 + number % 4)}ASSISTANT:"
        prompts.append({"prompt": text, "multi_modal_data": {"image": images}})
        values: dict[str, Any] = {"temperature": 0, "max_tokens": 40} | VALUES[number % len(VALUES)]
        if number % 2:
            values["structured_outputs"] = FORMS[number % len(FORMS)][0]
        params.append(SamplingParams(**values))
    return prompts, params


def check_forms(outputs: list[RequestOutput], params: list[SamplingParams]) -> int:
    """How many answers were looked at; those that were cut are not complete."""
    looked = 0
    for number, output in enumerate(outputs):
        form, fits = FORMS[number % len(FORMS)]
        for answer in output.outputs if params[number].structured_outputs else []:
            assert answer.finish_reason in ("stop", "length")
            if answer.finish_reason == "stop":
                assert fits(answer.text), (form, answer.text)
                looked += 1
    return looked


@pytest.fixture(scope="module")
def expected(folder: Path, photos: list[Image.Image]) -> list[list[int]]:
    """One after the other, without any company."""
    llm = LLM(folder, dtype="float32", device="cpu", max_num_seqs=3)
    prompts, params = mixed(photos)
    outputs = [llm.generate(prompt, param, use_tqdm=False)[0] for prompt, param in zip(prompts, params, strict=True)]
    assert check_forms(outputs, params) >= 10
    return [answer.token_ids for answer in answers(outputs)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("limits", SCHEDULES)
def test_every_schedule(
    limits: str, depth: int, folder: Path, photos: list[Image.Image], expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    llm = LLM(folder, dtype="float32", device="cpu", **SCHEDULES[limits])
    monkeypatch.setattr(llm._core, "_depth", depth)
    prompts, params = mixed(photos)
    for _ in range(2):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [answer.token_ids for answer in answers(outputs)] == expected
        llm._core.check_integrity()
    assert (llm._core.scheduler.num_preemptions > 0) == (limits == "few blocks")
    llm.generate("Hello", SamplingParams(max_tokens=1), use_tqdm=False)  # the next step clears what has ended
    assert not llm._core.runner._masks._answers


@pytest.mark.parametrize(("form", "fits"), FORMS, ids=[next(iter(form)) for form, _ in FORMS])
@pytest.mark.parametrize("values", VALUES, ids=str)
def test_every_form_with_every_parameter(llm: LLM, form: dict[str, Any], fits: Any, values: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=150, structured_outputs=form, **values)
    outputs = llm.generate(["Hello", "Once upon a time"], params, use_tqdm=False)
    for answer in answers(outputs):
        assert answer.finish_reason == "stop" or form == FORMS[3][0]  # brackets may open for ever
        assert answer.finish_reason == "length" or fits(answer.text), answer.text
        if params.logprobs:
            assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)


def test_chat(llm: LLM, photos: list[Image.Image]) -> None:
    said = [{"role": "user", "content": [{"type": "image", "image": photos[0]}, {"type": "text", "text": "Colour?"}]}]
    outputs = llm.chat(said, SamplingParams(structured_outputs={"choice": COLORS}), use_tqdm=False)
    assert outputs[0].outputs[0].text in COLORS


def test_stop_strings_and_lengths_end_earlier(llm: LLM) -> None:
    form = {"regex": "[0-9]{20}x[0-9]{20}"}
    stopped, cut = answers(
        llm.generate(
            ["Hi", "Hi"],
            [SamplingParams(max_tokens=60, stop="x", structured_outputs=form),
             SamplingParams(max_tokens=5, structured_outputs=form)],
            use_tqdm=False,
        )
    )  # fmt: skip
    assert re.fullmatch("[0-9]{20}", stopped.text) and (stopped.finish_reason, stopped.stop_reason) == ("stop", "x")
    assert re.fullmatch("[0-9]+", cut.text) and cut.finish_reason == "length" and len(cut.token_ids) == 5


def test_nothing_follows_a_complete_answer(llm: LLM) -> None:
    """But its end, whatever the model would rather say."""
    values = {"max_tokens": 30, "logit_bias": {llm.config.eos_token_ids[0]: -100.0}, "temperature": 0}
    answer = answers(
        llm.generate("Hi", SamplingParams(structured_outputs={"regex": "ab{3}"}, **values), use_tqdm=False)
    )
    assert (answer[0].text, answer[0].finish_reason) == ("abbb", "stop")
    assert answer[0].token_ids[-1] in llm.config.eos_token_ids


@pytest.mark.parametrize("depth", [1, 2])
def test_a_grammar_that_fails_ends_its_request_alone(depth: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one becomes too much for the library's limits after some tokens."""
    llm = LLM(folder, dtype="float32", device="cpu")
    monkeypatch.setattr(llm._core, "_depth", depth)
    plain = SamplingParams(temperature=0, max_tokens=30)
    wanted = answers(llm.generate("Hello", plain, use_tqdm=False))[0].token_ids
    core, inputs = llm._core, llm._inputs
    failing = SamplingParams(temperature=0, max_tokens=100, structured_outputs={"regex": "(.{1,1000}){1,1000}"})
    requests = [
        inputs.make_requests(inputs.process(inputs.encode("Hello"), []), params, max_tokens=params.max_tokens or 1,
                             arrival_time=0, request_id=name)[0]
        for name, params in (("plain", plain), ("failing", failing))
    ]  # fmt: skip
    assert not any(core.add(request) for request in requests)
    outputs = []
    while core.has_work:
        outputs += core.step().outputs
    core.check_integrity()
    of_plain = [output for output in outputs if output.request_id == "plain/0"]
    assert [token for output in of_plain for token in output.new_token_ids] == wanted
    ends = [output for output in outputs if output.request_id == "failing/0" and output.finish_reason]
    assert [(end.finish_reason, end.error, end.new_token_ids) for end in ends] == [
        ("error", "structured_outputs: the grammar became too complex", [])
    ]
    with pytest.raises(RuntimeError, match="structured_outputs: the grammar became too complex"):
        llm.generate("Hello", failing, use_tqdm=False)
    assert answers(llm.generate("Hello", plain, use_tqdm=False))[0].token_ids == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"structured_outputs": {"json": {"not": {}}}}, 'structured_outputs: Unimplemented keys: \\["not"\\]'),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs: invalid regex"),
    ],
)
def test_bad_forms_are_refused_before_anything_runs(llm: LLM, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(["Hi", "Hi"], [SamplingParams(), SamplingParams(**values)], use_tqdm=False)
    assert not llm._core.has_work


def test_documents_of_two_hundred_schemas(llm: LLM) -> None:
    """Drawn at random, with what closes strings and lists made likelier."""
    vocabulary = llm.get_tokenizer().get_vocab()
    bias = {vocabulary[token]: 4.0 for token in ('"', "}", "]", ":", ",", "0", "</s>")}
    schemas = [case["schema"] for case in json.loads(SCHEMAS.read_text())]
    common: dict[str, Any] = {"n": 2, "temperature": 1.5, "max_tokens": 150, "logit_bias": bias}
    params = [SamplingParams(seed=i, structured_outputs={"json": schema}, **common) for i, schema in enumerate(schemas)]
    complete, of = 0, set()
    for number, output in enumerate(llm.generate(["Hi"] * len(schemas), params, use_tqdm=False)):
        schema = schemas[number]
        validator = validator_for(schema, default=Draft202012Validator)(schema)
        for answer in output.outputs:
            if answer.finish_reason == "stop":
                validator.validate(json.loads(answer.text))
                complete += 1
                of.add(number)
    assert complete >= 0.95 * 2 * len(schemas) and len(of) >= 200


def test_nothing_is_compiled_between_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a request that waited, or that starts again after preemption, however full the compiler's cache is."""
    with LLM(folder, dtype="float32", device="cpu", max_model_len=256, num_gpu_blocks_override=12) as llm:
        step = llm._core.step

        def without_compiler() -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(llm._core.runner.grammars, "matcher", None)
                return step()

        monkeypatch.setattr(llm._core, "step", without_compiler)
        form = SamplingParams(temperature=0, max_tokens=60, structured_outputs={"regex": "[a-z]{40}"})
        outputs = llm.generate([f"USER: {number} ASSISTANT:" for number in range(12)], form, use_tqdm=False)
        assert all(re.fullmatch("[a-z]{40}", answer.text) for answer in answers(outputs))
        assert llm._core.scheduler.num_preemptions > 0
