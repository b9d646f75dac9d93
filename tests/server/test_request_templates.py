"""Chat templates that clients bring."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import MakeCheckpoint
from tests.server.errors import check_error
from tests.server.launch import Launch, Server, data_url, image_part, text_part, user

CHAT = "/v1/chat/completions"
MESSAGES = [user("Hi")]
LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def trusting(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    return launch(checkpoint(), "--served-model-name", "vlm", "--trust-request-chat-template")


def prompt(server: Server, **fields: Any) -> str:
    tokens = server.post("/tokenize", {"messages": MESSAGES, "add_special_tokens": False} | fields).json()["tokens"]
    return str(server.post("/detokenize", {"tokens": tokens}).json()["prompt"])


def test_they_are_refused_unless_trusted(server: Server) -> None:
    response = server.post(CHAT, {"messages": MESSAGES, "chat_template": LINES})
    check_error(response, "chat_template", "not allowed")


def test_they_render(trusting: Server, photo_files: list[Any]) -> None:
    assert prompt(trusting, chat_template=LINES) == "user: Hi\n"
    shown = prompt(trusting, chat_template=LINES + "{{ mood }}", chat_template_kwargs={"mood": "glad"})
    assert shown == "user: Hi\nglad"
    picture = user(text_part("What?"), image_part(data_url(photo_files[0])))
    body = {"messages": [picture], "chat_template": LINES, "temperature": 0, "max_tokens": 3}
    response = trusting.post(CHAT, body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 0


HOSTILE = {
    "never ends": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "one long computation": "{{ 9 ** (9 ** 9) }}",
    "doubles": "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "long": "{% for a in range(99999) %}{{ 'long ' * 1000 }}{% endfor %}",
    "no Jinja": "{% for %}",
    "raises": "{{ raise_exception('no') }}",
    "private": "{{ messages.__class__.__mro__ }}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "placeholder": LINES + "<image>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_render_is_refused(trusting: Server, name: str) -> None:
    with ThreadPoolExecutor() as pool:
        hostile = pool.submit(trusting.post, CHAT, {"messages": MESSAGES, "chat_template": HOSTILE[name]})
        time.sleep(0.2)
        other = trusting.post(CHAT, {"messages": MESSAGES, "max_tokens": 1})
        assert other.status_code == 200
        response = hostile.result()
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] in ("chat_template", "messages") and error["message"]
    assert "Traceback" not in response.text and "/" not in error["message"].replace("and/or", "")
    assert prompt(trusting, chat_template=LINES) == "user: Hi\n"
