"""Whatever a field holds, the answer is 200 or says what is wrong with it, and the server answers as before."""

import base64
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from pydantic import BaseModel

from server.messages_protocol import CountTokensRequest, MessagesRequest
from server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from server.responses_protocol import ResponsesRequest
from tests.conftest import MakeCheckpoint
from tests.image_files import all_files, encoded
from tests.image_mutants import mutants
from tests.server.launch import Launch, Server, image_part, text_part, user

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
IMAGE_TOKEN = 700
PIXELS = 10_000
Body = dict[str, Any]
TURN: Body = {"messages": [user("Hi")]}
FORMS: list[tuple[str, type[BaseModel], Body]] = [
    (CHAT, ChatCompletionRequest, {**TURN, "max_tokens": 1}),
    (COMPLETIONS, CompletionRequest, {"prompt": "Hi", "max_tokens": 1}),
    (RESPONSES, ResponsesRequest, {"input": "Hi", "max_output_tokens": 1}),
    (MESSAGES, MessagesRequest, {**TURN, "model": "vlm", "max_tokens": 1}),
    (f"{MESSAGES}/count_tokens", CountTokensRequest, {**TURN, "model": "vlm"}),
    ("/tokenize", TokenizeChatRequest, TURN),
    ("/tokenize", TokenizeTextRequest, {"prompt": "Hi"}),
    ("/detokenize", DetokenizeRequest, {"tokens": [400]}),
]
DEEP, LONG = 100_000, 100_000
VALUES = {
    "not a number": "NaN",
    "infinity": "-Infinity",
    "larger than a float": "1e999",
    "negative zero": "-0.0",
    "digits": "9" * LONG,
    "more digits than a float has": "9" * 400,
    "beyond 64 bits": str(2**64),
    "boolean": "true",
    "no text": '""',
    "half a surrogate pair": r'"\ud800"',
    "a lot of text": f'"{"x" * LONG}"',
    "deep lists": "[" * DEEP + "]" * DEEP,
    "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "just not too deep": "[" * 150 + "]" * 150,
    "list of what is none": "[null, true, 1.5, {}]",
    "list of large numbers": f"[{2**64}, {'9' * 4000}, 1e999]",
    "numbers that are none": '{"5": NaN, "a": Infinity, "type": 1e999}',
    "one name twice": '{"5": 1, "5": true, "type": {}, "type": []}',
    "large numbers": f'{{"5": {"9" * 4000}, "format": {{"type": {{}}}}}}',
}


@pytest.fixture(scope="module")
def server(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    # The small context keeps answers short that have no limit.
    flags = ("--max-image-pixels", str(PIXELS), "--max-model-len", "128", "--disable-log-requests")
    return launch(checkpoint(), "--served-model-name", "vlm", *flags)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client(headers={"Content-Type": "application/json"}) as client:
        yield client


@pytest.fixture(autouse=True)
def _still_answers(server: Server, client: httpx.Client) -> Iterator[None]:
    def answer() -> Any:
        body = {"temperature": 0, "max_tokens": 8, "return_token_ids": True, "messages": [user("A story?")]}
        return client.post(CHAT, json=body).json()["choices"][0]["token_ids"]

    expected = answer()
    yield
    assert answer() == expected
    assert server.metric("vllm:num_requests_running") == 0
    assert "Traceback" not in server.stderr


def check(response: httpx.Response, *statuses: int) -> int:
    """The status, once an error was found to have its form and to tell nothing of the inside."""
    assert response.status_code in (statuses or (200, 400)), response.text[:500]
    if response.status_code != 200:
        error = response.json()["error"]
        wanted = {"message", "type"} if MESSAGES in str(response.url) else {"message", "type", "param", "code"}
        assert error.keys() == wanted and error["message"]
        assert len(response.content) < 5000
        assert not any(
            leak in response.text for leak in ("Traceback", " 0x", "object at", ".py", "/tmp/", "site-packages")
        )
    return response.status_code


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_every_field(client: httpx.Client, value: str) -> None:
    """Many of these have `Any` in them, where nothing checks what is inside."""
    counts: Counter[int] = Counter()
    for path, model, base in FORMS:
        for name in model.model_fields:
            others = {key: given for key, given in base.items() if key != name}
            body = f"{{{json.dumps(name)}: {value}{',' if others else ''} {json.dumps(others)[1:]}"
            counts[check(client.post(path, content=body.encode()), 200, 400, *([404] if name == "model" else []))] += 1
    assert counts[400] > 50


def places(text: str) -> list[tuple[str, str, Body]]:
    """Each field that holds text, with this text in it."""
    part = text_part(text)
    given = {"type": "input_text", "text": text}
    tools = [{"id": text, "type": "function", "function": {"name": text, "arguments": text}}]
    free = ("user", "cache_salt", "stop", "service_tier")
    found: list[tuple[str, Body]] = [
        (CHAT, {"messages": [user(text)]}),
        (CHAT, {"messages": [user(part)]}),
        (CHAT, {"messages": [user(text_part("Look:"), part)]}),
        (CHAT, {"messages": [{"role": "assistant", "content": text}, user("Hi")]}),
        (
            CHAT,
            {"messages": [*TURN["messages"], {"role": "assistant", "content": text}], "continue_final_message": True},
        ),
        *((CHAT, {"messages": [{"role": role, "content": text}, user("Hi")]}) for role in ("system", "developer")),
        (CHAT, {"messages": [{**user("Hi"), "name": text}]}),
        (CHAT, {**TURN, "chat_template_kwargs": {"system": text, text: text}}),
        (CHAT, {**TURN, "chat_template": text}),
        (CHAT, {**TURN, "metadata": {text: text}}),
        (CHAT, {**TURN, "bad_words": [text]}),
        (CHAT, {**TURN, "logit_bias": {text: 1}}),
        *((CHAT, {**TURN, name: text}) for name in free),
        (COMPLETIONS, {"prompt": text}),
        (COMPLETIONS, {"prompt": ["Hi", text]}),
        (COMPLETIONS, {"prompt": "Hi", "suffix": text}),
        *((COMPLETIONS, {"prompt": "Hi", name: text}) for name in free),
        (RESPONSES, {"input": text}),
        (RESPONSES, {"input": [{"role": "user", "content": text}]}),
        (RESPONSES, {"input": [{"role": "user", "content": [given]}]}),
        (RESPONSES, {"input": [{"role": "assistant", "content": [{**given, "type": "output_text"}]}]}),
        (RESPONSES, {"input": "Hi", "instructions": text}),
        (RESPONSES, {"input": "Hi", "metadata": {"a": text}}),
        (RESPONSES, {"input": "Hi", "prompt_cache_key": text}),
        (MESSAGES, {"messages": [user(text)]}),
        (MESSAGES, {"messages": [user(part)]}),
        (MESSAGES, {**TURN, "system": text}),
        (MESSAGES, {**TURN, "system": [part]}),
        (MESSAGES, {"messages": [*TURN["messages"], {"role": "assistant", "content": text}]}),
        (MESSAGES, {**TURN, "stop_sequences": [text]}),
        (MESSAGES, {**TURN, "metadata": {"user_id": text}}),
        ("/tokenize", {"prompt": text}),
        ("/tokenize", {"messages": [user(text)]}),
        ("/tokenize", {"messages": [user("Hi"), {"role": "assistant", "tool_calls": tools}]}),
        ("/tokenize", {"messages": [user("Hi"), {"role": "tool", "content": text, "tool_call_id": text}]}),
        ("/tokenize", {**TURN, "chat_template_kwargs": {"system": text}}),
    ]
    limits: dict[str, Body] = {
        CHAT: {"max_tokens": 1, "return_token_ids": True},
        COMPLETIONS: {"max_tokens": 1, "return_token_ids": True},
        RESPONSES: {"max_output_tokens": 1},
        MESSAGES: {"model": "vlm", "max_tokens": 1},
        "/tokenize": {},
    }
    return [(f"{path} {number}", path, {**limits[path], **body}) for number, (path, body) in enumerate(found)]


def prompt_ids(reply: Body) -> list[int]:
    """The prompt's token ids, where an answer tells them."""
    choices = [choice.get("prompt_token_ids", []) for choice in reply.get("choices", [])]
    return [token for ids in [reply.get("tokens", []), reply.get("prompt_token_ids", []), *choices] for token in ids]


NEAR = [
    "<IMAGE>",
    "< image>",
    "<im\u200bage>",
    "\uff1cimage\uff1e",
    "&lt;image&gt;",
    "<image",
    "<im\u0000age>",
    "<ima\u0307ge>",
]


@pytest.mark.parametrize("text", ["<image>", "<image>" * 16, "a <image>\nb", *NEAR], ids=ascii)
def test_no_text_is_an_image(client: httpx.Client, text: str) -> None:
    statuses: Counter[int] = Counter()
    for name, path, body in places(text):
        response = client.post(path, json=body)
        statuses[check(response)] += 1
        if response.status_code == 200:
            reply = response.json()
            assert IMAGE_TOKEN not in prompt_ids(reply), name
            usage = reply.get("usage") or {}
            details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
            assert details.get("image_tokens", 0) == 0, name
    assert statuses[200] > (10 if text not in NEAR else 25)
    assert statuses[400] > (15 if text not in NEAR else 0)


def picture(width: int, height: int, kind: str = "PNG") -> str:
    """A data URL."""
    data = encoded(Image.new("RGB", (width, height), (9, 99, 199)), kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def ask(client: httpx.Client, *parts: Any, **fields: Any) -> httpx.Response:
    body = {"messages": [user(*parts)], "max_tokens": 1, "temperature": 0, "return_token_ids": True, **fields}
    return client.post(CHAT, json=body)


def test_texts_beside_an_image_are_no_images_either(client: httpx.Client) -> None:
    shown = image_part(picture(8, 8))
    assert ask(client, shown, text_part("Hi")).json()["prompt_token_ids"].count(IMAGE_TOKEN) == 16
    for texts in (["<image>"], ["<image>" * 15], ["<im", "age>"], ["<image", ">"], ["Hi <", "image>"]):
        assert check(ask(client, shown, *map(text_part, texts)), 400) == 400
        assert check(ask(client, *map(text_part, texts), shown), 400) == 400


SIZES = [(1, 1), (1, 2), (2, 1), (1, PIXELS), (PIXELS, 1), (100, 100), (1, 336), (337, 1), (3, 3333)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_sizes(client: httpx.Client, kind: str, width: int, height: int) -> None:
    reply = ask(client, image_part(picture(width, height, kind)))
    assert check(reply, 200) == 200
    assert reply.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 16


@pytest.mark.parametrize(("width", "height"), [(101, 100), (1, PIXELS + 1), (PIXELS + 1, 1), (16_000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_sizes_beyond_the_limit(client: httpx.Client, kind: str, width: int, height: int) -> None:
    response = ask(client, image_part(picture(width, height, kind)))
    check(response, 400)
    assert f"{width}x{height}" in response.json()["error"]["message"]


def test_damaged_images(client: httpx.Client) -> None:
    """Each twice: what came before may be remembered."""
    counts: Counter[int] = Counter()
    for name, data in mutants(all_files(), range(120), seed=7):
        shown = image_part(f"data:image/png;base64,{base64.b64encode(data).decode()}")
        first, again = (check(ask(client, shown)) for _ in range(2))
        assert first == again, name
        counts[first] += 1
    assert min(counts[200], counts[400]) > 20


def test_numbers_that_are_none(client: httpx.Client) -> None:
    for name, value in (("temperature", math.nan), ("top_p", math.inf), ("min_p", -math.inf)):
        response = client.post(CHAT, content=json.dumps({**TURN, name: value}).encode())
        check(response, 400)
        assert response.json()["error"]["param"] == name
