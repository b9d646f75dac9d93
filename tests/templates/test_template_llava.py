from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATE = Path(__file__).parents[2] / "templates" / "template_llava.jinja"
IMAGE = {"type": "image"}
IMAGE_URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def render(*messages: dict[str, Any], **options: Any) -> str:
    options.setdefault("add_generation_prompt", True)
    source = TEMPLATE.read_text(encoding="utf-8")
    rendered = render_jinja_template([list(messages)], chat_template=source, **options)[0]
    return str(rendered[0])


def test_whole_conversation() -> None:
    rendered = render(
        message("system", "Be brief."),
        message("user", [text("What is this?"), IMAGE]),
        message("assistant", "A cat."),
        message("user", "Its colour?"),
    )
    assert rendered == ("Be brief. USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Its colour? ASSISTANT:")


def test_one_text_message() -> None:
    assert render(message("user", "Hello")) == "USER: Hello ASSISTANT:"


def test_without_generation_prompt() -> None:
    rendered = render(message("user", "Hi"), message("assistant", "Hello."), add_generation_prompt=False)
    assert rendered == "USER: Hi ASSISTANT: Hello.</s>"


def test_continued_answer_stays_open() -> None:
    messages = message("user", "Hi"), message("assistant", "Hello, I")
    assert render(*messages, add_generation_prompt=False, continue_final_message=True) == (
        "USER: Hi ASSISTANT: Hello, I"
    )


@pytest.mark.parametrize("content", ["Be brief.", [text("Be brief.")]])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_text(role: str, content: Any) -> None:
    assert render(message(role, content), message("user", "Hi")) == "Be brief. USER: Hi ASSISTANT:"


@pytest.mark.parametrize("content", ["", []])
def test_empty_system_text_leaves_no_space(content: Any) -> None:
    assert render(message("system", content), message("user", "Hi")) == "USER: Hi ASSISTANT:"


@pytest.mark.parametrize("image", [IMAGE, IMAGE_URL])
def test_images_stand_before_the_text_of_their_own_message(image: dict[str, Any]) -> None:
    rendered = render(
        message("user", [text("Compare"), image, text("these."), image]),
        message("assistant", [text("Alike.")]),
        message("user", [image, text("And this?")]),
    )
    assert rendered == (
        "USER: <image>\n<image>\nCompare\nthese. ASSISTANT: Alike.</s>USER: <image>\nAnd this? ASSISTANT:"
    )


def test_image_without_text() -> None:
    assert render(message("user", [IMAGE])) == "USER: <image>\n ASSISTANT:"


def test_texts_are_kept_as_they_are() -> None:
    assert render(message("user", "  <b>&\n{{ x }}\n")) == "USER:   <b>&\n{{ x }}\n ASSISTANT:"


def test_answer_without_content() -> None:
    rendered = render(message("user", "Hi"), message("assistant", None), message("user", "Well?"))
    assert rendered == "USER: Hi ASSISTANT: </s>USER: Well? ASSISTANT:"


@pytest.mark.parametrize("options", [{}, {"trim_blocks": True, "lstrip_blocks": True}])
def test_does_not_depend_on_the_whitespace_settings_of_jinja(options: dict[str, bool]) -> None:
    template = jinja2.Environment(**options).from_string(TEMPLATE.read_text(encoding="utf-8"))  # type: ignore[arg-type]
    messages = [message("system", "Be brief."), message("user", [IMAGE, text("Hi")])]
    assert template.render(messages=messages, add_generation_prompt=True) == ("Be brief. USER: <image>\nHi ASSISTANT:")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "no user message"),
        ([message("system", "Be brief.")], "no user message"),
        ([message("assistant", "Hi")], "expected user, found assistant"),
        ([message("user", "a"), message("user", "b")], "expected assistant, found user"),
        ([message("user", "a"), message("system", "b")], "expected assistant, found system"),
        ([message("system", "a"), message("system", "b")], "expected user, found system"),
        (
            [message("user", "a"), message("assistant", "b"), message("tool", "c")],
            "expected user, found tool",
        ),
        ([message("system", [IMAGE]), message("user", "a")], "system message must not hold images"),
        ([message("user", "a"), message("assistant", [IMAGE])], "assistant messages must not hold images"),
        ([message("user", [{"type": "input_audio"}])], "must be of type text, image or image_url"),
        ([message("user", [{"text": "a"}])], "must be of type text, image or image_url"),
    ],
)
def test_refused_conversations(messages: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=problem):
        render(*messages)
