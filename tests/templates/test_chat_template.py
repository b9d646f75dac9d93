"""Prompts by templates of the public kinds are those of Hugging Face's own rendering, token for token."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, LlavaProcessor

from engine.args import EngineArgs
from engine.chat_template import ChatTemplate, find_template
from engine.config import create_config
from engine.input_processor import InputProcessor
from tests.conftest import MakeCheckpoint
from tests.random_tokenizer import BOS_ID, IMAGE_ID

FOLDER = Path(__file__).parent
LLAVA = FOLDER.parents[1] / "templates" / "template_llava.jinja"
Message = dict[str, Any]

SYSTEM, QUESTION, ANSWER, LAST = "Be brief.", "What is this, é?", "A cat.", "Its colour?"
# By template: whether it wants parts, and what it makes of the conversation below.
TEMPLATES: dict[Path, tuple[bool, str]] = {
    LLAVA: (True, "Be brief. USER: <image>\nWhat is this, é? ASSISTANT: A cat.</s>USER: Its colour? ASSISTANT:"),
    FOLDER / "llava_next_mistral.jinja": (
        True,
        "<<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] <image>\nWhat is this, é? [/INST] A cat.</s>[INST] Its colour? [/INST]",
    ),
    FOLDER / "llava_next_vicuna.jinja": (
        True,
        "Be brief. USER: <image>\nWhat is this, é? ASSISTANT: A cat. USER: Its colour? ASSISTANT:",
    ),
    FOLDER / "llama3.jinja": (
        False,
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this, é?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIts colour?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    FOLDER / "llama3_vision.jinja": (
        True,
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is this, é?<image><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIts colour?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    FOLDER / "chatml.jinja": (
        False,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is this, é?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nIts colour?<|im_end|>\n<|im_start|>assistant\n",
    ),
    FOLDER / "chatml_parts.jinja": (
        True,
        "<|im_start|>system \nBe brief.<|im_end|><|im_start|>user <image>\n\nWhat is this, é?<|im_end|>"
        "<|im_start|>assistant \nA cat.<|im_end|><|im_start|>user \nIts colour?<|im_end|><|im_start|>assistant\n",
    ),
}
FILES = pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)


@pytest.fixture(scope="module")
def inputs(checkpoint: MakeCheckpoint) -> InputProcessor:
    return InputProcessor(create_config(EngineArgs(model=str(checkpoint()), device="cpu")), 2048)


@pytest.fixture(scope="module")
def tokenizer(inputs: InputProcessor) -> Any:
    return inputs.tokenizer


def text(value: str) -> Message:
    return {"type": "text", "text": value}


def conversation(*, parts: bool, image: bool = True) -> list[Message]:
    """Texts as parts or as strings; the image is a part in any case, as clients send it."""
    picture: list[Message] = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}] if image else []
    turns = [("system", SYSTEM), ("user", QUESTION), ("assistant", ANSWER), ("user", LAST)]
    messages = [{"role": role, "content": [text(said)] if parts else said} for role, said in turns]
    if image:
        messages[1]["content"] = [text(QUESTION), *picture]
    return messages


def native(messages: list[Message], *, parts: bool) -> list[Message]:
    """Messages in the form that a template was written for, from ones whose contents are parts."""
    shown = []
    for message in messages:
        content = message["content"]
        images = sum(part["type"] != "text" for part in content)
        said = "".join(part["text"] for part in content if part["type"] == "text")
        as_parts = [part if part["type"] == "text" else {"type": "image"} for part in content]
        made: Any = as_parts if parts else "<image>\n" * images + said
        shown.append({"role": message["role"], "content": made})
    return shown


def rendered(tokenizer: Any, file: Path, messages: list[Message], **options: Any) -> str:
    return ChatTemplate(tokenizer, file.read_text(), "<image>").render(messages, **options)


def reference(tokenizer: Any, file: Path, messages: list[Message], *, tokenize: bool = False, **options: Any) -> Any:
    """Hugging Face's rendering, as a text or as token ids."""
    source, parts = file.read_text(), TEMPLATES[file][0]
    shown = native(messages, parts=parts)
    if file.stem == "llama3_vision":  # takes the system message for a string
        shown[0]["content"] = SYSTEM
    return tokenizer.apply_chat_template(shown, chat_template=source, tokenize=tokenize, return_dict=False, **options)


@FILES
def test_golden(tokenizer: Any, file: Path) -> None:
    wanted = TEMPLATES[file][1]
    assert rendered(tokenizer, file, conversation(parts=True)) == wanted
    assert rendered(tokenizer, file, conversation(parts=False)) == wanted


@FILES
@pytest.mark.parametrize("image", [True, False])
def test_token_ids_are_those_of_transformers(inputs: InputProcessor, file: Path, image: bool) -> None:
    """With one BOS, whether the template writes it or not."""
    messages = conversation(parts=True, image=image)
    wanted = reference(inputs.tokenizer, file, messages, tokenize=True, add_generation_prompt=True)
    if wanted[0] != BOS_ID:
        wanted = [BOS_ID, *wanted]
    found = inputs.encode(rendered(inputs.tokenizer, file, messages))
    assert found == wanted
    assert found.count(BOS_ID) == 1 and found.count(IMAGE_ID) == image


@FILES
@pytest.mark.parametrize("image", [True, False])
def test_a_string_is_one_part_of_text(tokenizer: Any, file: Path, image: bool) -> None:
    as_parts, as_strings = (
        rendered(tokenizer, file, conversation(parts=parts, image=image), add_generation_prompt=False)
        for parts in (True, False)
    )
    assert as_parts == as_strings


@FILES
def test_continued_answer(tokenizer: Any, file: Path) -> None:
    for parts in (True, False):
        messages = conversation(parts=parts)[:3]
        options = {"add_generation_prompt": False, "continue_final_message": True}
        found = rendered(tokenizer, file, messages, **options)
        wanted = reference(tokenizer, file, conversation(parts=True)[:3], **options)
        assert found == wanted
        assert found.endswith(ANSWER)


@FILES
def test_parts_are_joined_by_the_template_that_takes_them(tokenizer: Any, file: Path) -> None:
    """One that takes strings gets a line for each part."""
    messages = [{"role": "user", "content": [text("one"), text("two")]}]
    takes_parts = TEMPLATES[file][0]
    shown = messages if takes_parts else [{"role": "user", "content": "one\ntwo"}]
    wanted = tokenizer.apply_chat_template(
        shown, chat_template=file.read_text(), tokenize=False, add_generation_prompt=True
    )
    assert rendered(tokenizer, file, messages) == wanted


@FILES
@pytest.mark.parametrize("role", ["system", "assistant"])
def test_no_part_of_a_turn_is_lost(tokenizer: Any, file: Path, role: str) -> None:
    """Several texts of a turn that is not the user's, which some templates print as a list or cut to the first one."""
    said: Message = {"role": role, "content": [text("One."), text("Two.")]}
    first: Message = {"role": "user", "content": QUESTION}
    last: Message = {"role": "user", "content": LAST}
    found = rendered(tokenizer, file, [first, said, last] if role == "assistant" else [said, last])
    assert "'type'" not in found
    assert found.index("One.") < found.index("Two.") < found.index(LAST)


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{{ messages[0].content | tojson }}"])
def test_a_list_that_is_printed_was_not_understood(tokenizer: Any, source: str) -> None:
    said = ChatTemplate(tokenizer, source, None).render([{"role": "user", "content": [text("Hi"), text("you")]}])
    assert said.strip('"') in ("Hi\nyou", "Hi\\nyou")


OWN = "tokenizer's"
FILES_BY_RANK = ["processor_config.json", "chat_template.json", "chat_template.jinja"]


def write_template(folder: Path, name: str) -> None:
    (folder / name).write_text(name if name.endswith("jinja") else json.dumps({"chat_template": name}))


@pytest.mark.parametrize("names", [c for n in range(4) for c in combinations(FILES_BY_RANK, n)], ids="+".join)
def test_of_several_templates_the_one_that_transformers_takes(
    tmp_path: Path, checkpoint: MakeCheckpoint, names: tuple[str, ...]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint(), folder)
    for name in FILES_BY_RANK:
        (folder / name).unlink(missing_ok=True)
    for name in names:
        write_template(folder, name)
    for vision in (None, object()):
        config: Any = SimpleNamespace(model_path=folder, vision=vision)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        wanted = tokenizer.chat_template
        if vision is not None:
            given = LlavaProcessor.get_processor_dict(folder)[0].get("chat_template")
            wanted = wanted if given is None else given
        if wanted is not None:
            assert find_template(config, None, tokenizer) == wanted


def test_templates_that_only_processors_know_serve_a_text_model_too(tmp_path: Path) -> None:
    config: Any = SimpleNamespace(model_path=tmp_path, vision=None)
    write_template(tmp_path, "chat_template.json")
    assert find_template(config, None, SimpleNamespace(chat_template=OWN)) == OWN
    assert find_template(config, None, SimpleNamespace(chat_template=None)) == "chat_template.json"


@pytest.mark.parametrize(
    ("source", "role"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "developer"),
        ("{% for m in messages %}{% if m.role in ('system', 'user') %}{{ m.role }}: {{ m.content }}\n{% endif %}"
         "{% endfor %}", "system"),
        ("{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('who?') }}{% endif %}"
         "{{ m.role }}: {{ m.content }}\n{% endfor %}", "system"),
        ("{% for m in messages if m.role != 'developer' %}{{ m.role }}: {{ m.content[0].text }}\n"
         "{% endfor %}", "system"),
    ],
)  # fmt: skip
def test_a_developer_is_the_system_where_a_template_does_not_know_it(tokenizer: Any, source: str, role: str) -> None:
    messages: list[Message] = [{"role": "developer", "content": SYSTEM}, {"role": "user", "content": LAST}]
    assert ChatTemplate(tokenizer, source, None).render(messages) == f"{role}: {SYSTEM}\nuser: {LAST}\n"
