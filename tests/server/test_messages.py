"""`POST /v1/messages` as Anthropic's client and as a plain one see it."""

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import TypeAdapter

from server import messages_answer
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec
from tests.server.errors import error_of
from tests.server.launch import Launch, Server, assistant, data_url, image_part, text_part, user

PATH, COUNT, CHAT = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
QUESTION = [user("Tell me a story about the sea, please.")]
RUNNING = "vllm:num_requests_running"
SUCCESS = "vllm:request_success_total"
GREEDY: dict[str, Any] = {"temperature": 0}
EVENTS = ["message_start", "content_block_start", "ping", "content_block_stop", "message_delta", "message_stop"]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def narrow(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    """Asks for a key, answers one request at a time, and lets answers be so long that they can be interrupted."""
    return launch(
        checkpoint(CheckpointSpec(max_position_embeddings=16384)), "--served-model-name", "vlm", "--api-key", "key",
        "other-key", "--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--max-request-bytes", "50000",
    )  # fmt: skip


def body(messages: list[Any] = QUESTION, **fields: Any) -> dict[str, Any]:
    return {"model": "vlm", "max_tokens": 16, "temperature": 0, "messages": messages} | fields


def answer(server: Server, messages: list[Any] = QUESTION, **fields: Any) -> dict[str, Any]:
    response = server.post(PATH, body(messages, **fields))
    assert response.status_code == 200, response.text
    return dict(response.json())


def text_of(message: dict[str, Any]) -> str:
    (block,) = message["content"]
    assert block.keys() == {"type", "text"} and block["type"] == "text"
    return str(block["text"])


def events_of(lines: str) -> list[dict[str, Any]]:
    """The events of a stream whose framing was checked."""
    blocks = lines.split("\n\n")
    assert blocks.pop() == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def stream(server: Server, messages: list[Any] = QUESTION, **fields: Any) -> list[dict[str, Any]]:
    response = server.post(PATH, body(messages, **fields, stream=True))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def check_error(response: httpx.Response, status: int, kind: str, *words: object) -> str:
    """The message of an error in Anthropic's form, which holds each of the words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    found = response.json()
    assert found.keys() == {"type", "error"} and found["type"] == "error"
    assert found["error"].keys() == {"type", "message"} and found["error"]["type"] == kind, found
    for word in words:
        assert str(word) in found["error"]["message"], found
    return str(found["error"]["message"])


def block(file: Path) -> dict[str, Any]:
    """An image file as a block."""
    data = base64.b64encode(file.read_bytes()).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": data}}


def url_block(url: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "url", "url": url}}


def test_form_of_a_response(server: Server) -> None:
    message = answer(server, max_tokens=4)
    assert message.keys() == {
        "id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage",
    }  # fmt: skip
    assert message["id"].startswith("msg_") and message["id"] != answer(server, max_tokens=4)["id"]
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "vlm")
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    assert text_of(message)
    assert message["usage"].keys() == {
        "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens",
    }  # fmt: skip
    assert message["usage"]["output_tokens"] == 4


def test_form_of_a_stream(server: Server) -> None:
    plain, events = answer(server), stream(server)
    kinds = [event["type"] for event in events]
    assert kinds == [*EVENTS[:3], *["content_block_delta"] * (len(events) - 6), *EVENTS[3:]]
    start, block_start, ping, *deltas, block_stop, message_delta, message_stop = events
    message = start["message"]
    assert message.keys() == plain.keys() and message["id"].startswith("msg_")
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
    counted = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    assert sum(message["usage"][name] for name in counted) == sum(plain["usage"][name] for name in counted)
    assert (message["usage"]["cache_read_input_tokens"], message["usage"]["output_tokens"]) == (0, 0)
    assert ping == {"type": "ping"}
    assert block_start == {
        "type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""},
    }  # fmt: skip
    assert len(deltas) > 1
    for delta in deltas:
        assert delta.keys() == {"type", "index", "delta"} and delta["index"] == 0
        assert delta["delta"].keys() == {"type", "text"} and delta["delta"]["type"] == "text_delta"
    assert block_stop == {"type": "content_block_stop", "index": 0}
    assert message_delta["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    told = message_delta["usage"]
    assert sum(told[name] for name in counted) == sum(message["usage"][name] for name in counted)
    assert told["output_tokens"] == 16
    assert message_stop == {"type": "message_stop"}


STREAMED: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 100},
    {"stop_sequences": ["e", "a"]},
    {"stop_sequences": [" c", "never"], "max_tokens": 60},
    {"stop_sequences": ["n " * 40], "max_tokens": 60},
    {"system": "Be brief."},
    {"temperature": 1, "top_k": 1},
    {"messages": [*QUESTION, assistant("It was")]},
]


@pytest.mark.parametrize("fields", STREAMED, ids=json.dumps)
def test_joined_stream_is_the_plain_response(server: Server, fields: dict[str, Any]) -> None:
    plain, events = answer(server, **fields), stream(server, **fields)
    joined = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert joined == text_of(plain)
    (end,) = [event for event in events if event["type"] == "message_delta"]
    assert end["delta"] == {name: plain[name] for name in ("stop_reason", "stop_sequence")}
    assert end["usage"]["output_tokens"] == plain["usage"]["output_tokens"]


SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("plain", {}, {"messages": QUESTION}),
    ("blocks", {"messages": [user(text_part("One."), text_part("Two."))]},
     {"messages": [user(text_part("One."), text_part("Two."))]}),
    ("system", {"system": "Speak of whales."},
     {"messages": [{"role": "system", "content": "Speak of whales."}, *QUESTION]}),
    ("system blocks", {"system": [text_part("Be brief."), text_part("Be kind.")]},
     {"messages": [{"role": "system", "content": [text_part("Be brief."), text_part("Be kind.")]}, *QUESTION]}),
    ("turns", {"messages": [user("Hi"), assistant("Hello."), user("Go on.")]},
     {"messages": [user("Hi"), assistant("Hello."), user("Go on.")]}),
    ("joined turns",
     {"messages": [user("Hi"), user(text_part("there")), assistant("Yes"), assistant("?"), user("Go on.")]},
     {"messages": [user(text_part("Hi"), text_part("there")),
                   {"role": "assistant", "content": [text_part("Yes"), text_part("?")]}, user("Go on.")]}),
    ("prefill", {"messages": [*QUESTION, assistant("Once upon")]},
     {"messages": [*QUESTION, assistant("Once upon")], "continue_final_message": True}),
    ("prefill in blocks", {"messages": [*QUESTION, {"role": "assistant", "content": [text_part("Once upon")]}]},
     {"messages": [*QUESTION, assistant("Once upon")], "continue_final_message": True}),
    ("blank prefill", {"messages": [*QUESTION, assistant(" ")]}, {"messages": QUESTION}),
    ("stop", {"stop_sequences": ["e", "o"]}, {"messages": QUESTION, "stop": ["e", "o"]}),
    ("sampling", {"temperature": 0.5, "top_k": 1}, {"messages": QUESTION, "temperature": 0.5, "top_k": 1}),
    ("nucleus", {"temperature": 1, "top_p": 1e-6}, {"messages": QUESTION, "temperature": 1, "top_p": 1e-6}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "chat"), [case[1:] for case in SAME], ids=[case[0] for case in SAME])
def test_same_as_chat_completions(server: Server, fields: dict[str, Any], chat: dict[str, Any]) -> None:
    found = answer(server, **{"max_tokens": 24, **fields})
    wanted = server.post(CHAT, {"temperature": 0, "max_tokens": 24, **chat}).json()
    assert text_of(found) == wanted["choices"][0]["message"]["content"]
    check_usage(found, wanted)


def check_usage(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The same prompt and as long an answer, whatever of it was cached."""
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == wanted["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == wanted["usage"]["completion_tokens"]
    assert usage["cache_creation_input_tokens"] == 0


def test_different_requests_differ(server: Server) -> None:
    """Else the comparisons above would show nothing."""
    texts = [text_of(answer(server, **{"max_tokens": 24, **fields})) for name, fields, _ in SAME if name in (
        "plain", "blocks", "system", "system blocks", "turns", "joined turns", "prefill")]  # fmt: skip
    assert len(set(texts)) == 7


def test_images(server: Server, photo_files: list[Path]) -> None:
    words = text_part("Look.")
    messages = [user(block(photo_files[0]), words), assistant("Yes."), user(words, *map(block, photo_files))]
    parts = [image_part(data_url(file)) for file in photo_files]
    found = answer(server, messages)
    chat = [user(parts[0], words), assistant("Yes."), user(words, *parts)]
    wanted = server.post(CHAT, {"messages": chat, "temperature": 0, "max_tokens": 16}).json()
    assert text_of(found) == wanted["choices"][0]["message"]["content"]
    assert wanted["usage"]["prompt_tokens_details"]["image_tokens"] == 3 * 16
    check_usage(found, wanted)
    swapped = [user(block(photo_files[1]), words), assistant("Yes."), user(words, *map(block, photo_files))]
    assert text_of(answer(server, swapped)) != text_of(found)


def test_stop_sequences(server: Server) -> None:
    whole = text_of(answer(server, max_tokens=40))
    stop = whole[12:15]
    cut = answer(server, max_tokens=40, stop_sequences=["\0never", stop])
    assert text_of(cut) == whole[: whole.index(stop)]
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", stop)
    at_once = answer(server, stop_sequences=[whole[0]])
    assert text_of(at_once) == "" and at_once["stop_sequence"] == whole[0]
    assert [event["type"] for event in stream(server, stop_sequences=[whole[0]])] == EVENTS


def test_an_end_of_its_own(launch: Launch, checkpoint: MakeCheckpoint, server: Server) -> None:
    """The token that comes first is made the one that ends an answer."""
    ids = server.post(CHAT, {"messages": QUESTION, "temperature": 0, "max_tokens": 9, "return_token_ids": True}).json()
    place = 5
    end = ids["choices"][0]["token_ids"][place]
    assert end not in ids["choices"][0]["token_ids"][:place]
    ending = launch(checkpoint(CheckpointSpec(eos_token_id=end)), "--served-model-name", "vlm")
    message = answer(ending)
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    assert message["usage"]["output_tokens"] == place + 1
    assert stream(ending)[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def test_cached_tokens(server: Server) -> None:
    messages = [user("A beginning that nobody else in this file has. " * 8)]
    first, second = (answer(server, messages, max_tokens=1)["usage"] for _ in range(2))
    assert first["cache_read_input_tokens"] < second["cache_read_input_tokens"]
    whole = server.post(COUNT, {"model": "vlm", "messages": messages}).json()["input_tokens"]
    for usage in (first, second):
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == whole
    (end,) = [event for event in stream(server, messages, max_tokens=1) if event["type"] == "message_delta"]
    assert end["usage"]["cache_read_input_tokens"] == second["cache_read_input_tokens"] > 0


def test_fields_without_effect(server: Server) -> None:
    control = {"cache_control": {"type": "ephemeral"}}
    fields: dict[str, Any] = {
        "metadata": {"user_id": "me"}, "service_tier": "auto", "thinking": {"type": "disabled"}, "tools": [],
        "tool_choice": {"type": "auto"}, "mcp_servers": [], "container": None, "stop_sequences": [], "stream": False,
        "an_unknown_field": {"x": 1}, "output_config": {}, "speed": "standard", "system": None, "top_p": None,
        **control,
    }  # fmt: skip
    messages = [user({**text_part(QUESTION[0]["content"]), **control, "citations": None})]
    assert text_of(answer(server, messages, **fields)) == text_of(answer(server))
    fields = {"service_tier": "standard_only", "tool_choice": {"type": "none"}, "metadata": None}
    assert text_of(answer(server, **fields)) == text_of(answer(server))


def test_client(client: Anthropic, server: Server, photo_files: list[Path]) -> None:
    content: Any = [block(photo_files[0]), text_part("What is this?")]
    options: Any = {"model": "vlm", "messages": [user(*content)], "system": "Be brief.", "extra_body": GREEDY}
    message = client.messages.create(**options, max_tokens=20, stop_sequences=["\0never"])
    assert message.content[0].type == "text" and message.stop_reason == "max_tokens"
    with client.messages.stream(**options, max_tokens=20) as streamed:
        joined = "".join(streamed.text_stream)
        final = streamed.get_final_message()
    assert joined == message.content[0].text == streamed.get_final_text()
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 20
    read = message.usage.cache_read_input_tokens
    assert read is not None
    counted = client.messages.count_tokens(**options)
    assert counted.input_tokens == message.usage.input_tokens + read
    cut = client.messages.create(**options, max_tokens=20, stop_sequences=[joined[4:6]])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", joined[4:6])


async def test_async_client(server: Server) -> None:
    options: Any = {"model": "vlm", "messages": QUESTION, "max_tokens": 12, "extra_body": GREEDY}
    async with AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        raw = [event.type async for event in await client.messages.create(**options, stream=True)]
        assert list(dict.fromkeys(raw)) == [*EVENTS[:2], "content_block_delta", *EVENTS[3:]]  # it hides the ping
        async with client.messages.stream(**options) as streamed:
            text = await streamed.get_final_text()
    assert text == text_of(answer(server, max_tokens=12))


def test_client_errors(client: Anthropic) -> None:
    options: Any = {"model": "vlm", "messages": QUESTION, "max_tokens": 1}
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**options, extra_body={"temperature": 1.5})
    with pytest.raises(anthropic.NotFoundError, match="'absent'"):
        client.messages.create(**options | {"model": "absent"})
    tools: Any = [{"name": "f", "input_schema": {"type": "object"}}]
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        client.messages.create(**options, stream=True, tools=tools)


@pytest.mark.parametrize("fields", [case[1] for case in SAME], ids=[case[0] for case in SAME])
def test_counted_tokens(server: Server, fields: dict[str, Any]) -> None:
    usage = answer(server, **{**fields, "max_tokens": 1})["usage"]
    counted = server.post(COUNT, {"model": "vlm", "messages": QUESTION} | fields)
    assert counted.status_code == 200, counted.text
    assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_counted_tokens_of_images(server: Server, photo_files: list[Path]) -> None:
    def count(*blocks: Any) -> int:
        response = server.post(COUNT, {"model": "vlm", "messages": [user(*blocks)]})
        assert response.status_code == 200, response.text
        return int(response.json()["input_tokens"])

    words, picture = text_part("Look."), block(photo_files[0])
    before = server.metric("vllm:prompt_tokens_total")
    encoded = server.metric("vllm:image_encoder_images_total")
    # No such host is anywhere: it would be an error to ask it.
    assert count(url_block("https://images.invalid/a.png"), words) == count(picture, words)
    one, two = count(picture, words), count(picture, picture, words)
    assert server.metric("vllm:prompt_tokens_total") == before
    assert server.metric("vllm:image_encoder_images_total") == encoded
    usage = answer(server, [user(picture, picture, words)], max_tokens=1)["usage"]
    assert two == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert two - one >= 16


NOT_SERVED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"name": "f", "input_schema": {"type": "object"}}]}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
    ({"tool_choice": {}}, "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"thinking": {"type": "adaptive"}}, "thinking"),
    ({"container": "container_1"}, "container"),
    ({"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]}, "mcp_servers"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config"),
    ({"output_format": {"type": "json_schema"}}, "output_format"),
    ({"context_management": {"edits": [{}]}}, "context_management"),
    ({"diagnostics": {"previous_message_id": "msg_1"}}, "diagnostics"),
    ({"inference_geo": "eu"}, "inference_geo"),
]


@pytest.mark.parametrize(("fields", "name"), NOT_SERVED, ids=lambda value: json.dumps(value)[:60])
@pytest.mark.parametrize("path", [PATH, COUNT])
def test_what_is_not_served_says_so(server: Server, path: str, fields: dict[str, Any], name: str) -> None:
    message = check_error(server.post(path, body(**fields)), 400, "invalid_request_error", "not available")
    assert message.startswith(f"{name} ")


def source(**fields: Any) -> list[Any]:
    return [user({"type": "image", "source": fields})]


BAD_CONVERSATIONS: list[tuple[dict[str, Any], tuple[object, ...]]] = [
    ({"model": None}, ("model: ",)),
    ({"model": 5}, ("model: ", "string", 5)),
    ({"speed": "fast"}, ("speed: ", "'fast'")),
    ({"thinking": "enabled"}, ("thinking: ",)),
    ({"messages": []}, ("messages: ", 1)),
    ({"messages": "x"}, ("messages: ", "'x'")),
    ({"messages": [{"role": "system", "content": "x"}]}, ("messages.0.role: ", "'user' or 'assistant'", "'system'")),
    ({"messages": [user("x"), {"role": "user"}]}, ("messages.1.content: ", "required")),
    ({"messages": [{"role": "user", "content": 5}]}, ("messages.0.content: ", 5)),
    ({"messages": [user(5, "x")]}, ("messages.0.content.0: ",)),
    ({"messages": [user({"text": "x"})]}, ("messages.0.content.0: ", "'type'")),
    ({"messages": [user({"type": "text"})]}, ("messages.0.content.0.text: ", "required")),
    *(
        ({"messages": [user("x"), user(text_part("x"), {"type": kind})]},
         ("messages.1.content.1: ", f"'{kind}'", "'text', 'image'"))
        for kind in ("tool_use", "tool_result", "document", "thinking", "search_result", "image_url")
    ),
    ({"messages": [user({"type": "image"})]}, ("messages.0.content.0.source: ", "required")),
    ({"messages": source(type="file", file_id="f")}, ("messages.0.content.0.source: ", "'file'", "'base64', 'url'")),
    ({"messages": source(type="url")}, ("messages.0.content.0.source.url: ", "required")),
    ({"messages": source(type="base64", data="AAAA")}, ("messages.0.content.0.source.media_type: ", "required")),
    ({"messages": source(type="base64", media_type="image/png")}, ("messages.0.content.0.source.data: ", "required")),
    ({"messages": source(type="base64", media_type="image/svg+xml", data="AAAA")},
     ("messages.0.content.0.source.media_type: ", "'image/png'", "'image/svg+xml'")),
    ({"messages": source(type="base64", media_type="image/png", data="AAAA")}, ("messages: ", "JPEG, PNG")),
    ({"messages": source(type="base64", media_type="image/png", data="@@@")}, ("messages: ", "base64")),
    ({"messages": source(type="url", url="ftp://example.com/x.png")}, ("messages: ", "'ftp:")),
    ({"messages": source(type="url", url="http://")}, ("messages: ", "not valid")),
    ({"messages": source(type="url", url="file:///etc/passwd")}, ("messages: ", "--allowed-local-media-path")),
    ({"messages": source(type="url", url="http://user:secret@example.com/")}, ("messages: ", "password")),
    ({"messages": [user(*[url_block("https://x.invalid")] * 129)]}, ("messages: ", 129, 128)),
    ({"messages": [user("x"), {"role": "assistant", "content": [url_block("https://x.invalid")]}]},
     ("messages: ", "assistant", "images")),
    ({"messages": [user("a <image> b")]}, ("messages: ", "<image>")),
    ({"messages": [user(*[text_part("x")] * 600), user(*[text_part("x")] * 600)]}, ("messages: ", "user", 1200, 1024)),
    ({"system": [text_part("x")] * 1025}, ("messages: ", "system", 1025, 1024)),
    ({"messages": [user("x")] * 1025}, ("messages: ", 1024)),
    ({"messages": [assistant(" ")]}, ("messages: ",)),
    ({"system": 5}, ("system: ", 5)),
    ({"system": "<image>"}, ("system holds", "<image>")),
    ({"system": [{"type": "image"}]}, ("system.0.type: ", "'text'", "'image'")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), BAD_CONVERSATIONS, ids=lambda value: json.dumps(value, default=str)[:60])
@pytest.mark.parametrize("path", [PATH, COUNT])
def test_bad_conversations(server: Server, path: str, fields: dict[str, Any], words: tuple[object, ...]) -> None:
    message = check_error(server.post(path, body(**fields)), 400, "invalid_request_error", *words)
    assert "secret" not in message


BAD_FIELDS: list[tuple[dict[str, Any], tuple[object, ...]]] = [
    ({"max_tokens": None}, ("max_tokens: ",)),
    ({"max_tokens": 0}, ("max_tokens ", 0, 1)),
    ({"max_tokens": 1.5}, ("max_tokens: ", 1.5)),
    ({"max_tokens": 5000}, ("max_tokens ", 5000, 2048)),
    ({"temperature": 1.01}, ("temperature: ", 1.01, "1")),
    ({"temperature": -0.1}, ("temperature: ", -0.1, "0")),
    ({"temperature": "1"}, ("temperature: ", "'1'")),
    ({"top_p": 2}, ("top_p ", 2, 1)),
    ({"top_k": -5}, ("top_k ", -5)),
    ({"stop_sequences": "x"}, ("stop_sequences: ", "'x'")),
    ({"stop_sequences": [""]}, ("stop_sequences.0: ", 1)),
    ({"stop_sequences": ["a", "a" * 1025]}, ("stop_sequences.1: ", 1024)),
    ({"stop_sequences": ["a"] * 17}, ("stop_sequences: ", 16)),
    ({"stream": "yes"}, ("stream: ", "'yes'")),
    ({"metadata": {"user_id": 5}}, ("metadata.user_id: ", 5)),
    ({"service_tier": "priority"}, ("service_tier: ", "'standard_only'", "'priority'")),
    ({"messages": [user("long " * 3000)]}, ("messages: ", 2048)),
    ({"messages": source(type="url", url="http://127.0.0.1:1/x.png")}, ("messages: ", "not public")),
    ({"messages": source(type="url", url="http://[::1]:1/x.png")}, ("messages: ", "not public")),
    ({"messages": source(type="url", url="http://169.254.169.254/latest")}, ("messages: ", "not public")),
]


@pytest.mark.parametrize(("fields", "words"), BAD_FIELDS, ids=lambda value: json.dumps(value, default=str)[:60])
@pytest.mark.parametrize("streams", [False, True])
def test_bad_fields(server: Server, fields: dict[str, Any], words: tuple[object, ...], streams: bool) -> None:
    asked = body(**{"stream": streams, **fields})
    check_error(server.post(PATH, asked), 400, "invalid_request_error", *words)


def test_missing_fields(server: Server) -> None:
    for name in ("model", "max_tokens", "messages"):
        asked = {key: value for key, value in body().items() if key != name}
        check_error(server.post(PATH, asked), 400, "invalid_request_error", f"{name}: ", "required")


@pytest.mark.parametrize("path", [PATH, COUNT])
def test_errors_of_the_framework(server: Server, path: str) -> None:
    for content in (b"", b"null", b"[]", b'{"messages":', b"[" * 100_000, b'{"model": "\xff"}'):
        with server.client() as client:
            response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        check_error(response, 400, "invalid_request_error")
    check_error(server.get(path), 405, "invalid_request_error")
    text = httpx.post(f"{server.url}{path}", content="{}", headers={"Content-Type": "text/plain"}, trust_env=False)
    check_error(text, 415, "invalid_request_error", "text/plain")
    check_error(server.post(path, body(model="absent")), 404, "not_found_error", "model: ", "'absent'")
    check_error(server.post("/v1/messages/absent", {}), 404, "not_found_error")
    error_of(server.post("/v1/messages-of-others", {}), 404)  # elsewhere errors have OpenAI's form


KEYS: list[tuple[dict[str, str], int]] = [
    ({"x-api-key": "key"}, 200), ({"X-API-Key": "other-key"}, 200), ({"Authorization": "Bearer key"}, 200),
    ({"x-api-key": "key", "Authorization": "Bearer wrong"}, 200),
    ({"x-api-key": "wrong", "Authorization": "Bearer key"}, 200),
    ({}, 401), ({"x-api-key": "wrong"}, 401), ({"x-api-key": ""}, 401), ({"x-api-key": "Bearer key"}, 401),
    ({"x-api-key": "ke"}, 401), ({"x-api-key": "key2"}, 401), ({"Authorization": "key"}, 401),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "status"), KEYS)
@pytest.mark.parametrize("path", [PATH, COUNT])
def test_keys(narrow: Server, path: str, headers: dict[str, str], status: int) -> None:
    response = narrow.post(path, body(max_tokens=1), headers=headers)
    assert response.status_code == status
    if status == 401:
        check_error(response, 401, "authentication_error", "key")
        error_of(narrow.get("/v1/models", headers=headers), 401)
    else:
        assert narrow.get("/v1/models", headers=headers).status_code == 200


def test_clients_with_keys(narrow: Server) -> None:
    options: Any = {"model": "vlm", "messages": QUESTION, "max_tokens": 1}
    for given in ({"api_key": "key"}, {"auth_token": "other-key"}, {"api_key": "no", "default_headers": KEYS[0][0]}):
        fields: Any = given
        with Anthropic(base_url=narrow.url, max_retries=0, **fields) as client:
            assert client.messages.create(**options).usage.output_tokens == 1
    with (
        Anthropic(base_url=narrow.url, max_retries=0, api_key="no") as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        client.messages.create(**options)


def test_a_body_that_is_too_large(narrow: Server) -> None:
    response = narrow.post(PATH, body([user("x" * 60_000)]), headers=KEYS[0][0])
    check_error(response, 413, "request_too_large", 50000)


LONGEST = 16000


def test_a_client_that_leaves_a_stream(narrow: Server) -> None:
    aborted = narrow.metric(SUCCESS, finished_reason="abort")
    asked = body(max_tokens=LONGEST, stream=True)
    with narrow.client(headers=KEYS[0][0]) as client, client.stream("POST", PATH, json=asked) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number > 20:
                assert narrow.metric(RUNNING) == 1
                break
    narrow.wait_for_metric(RUNNING, lambda value: value == 0)
    assert narrow.metric("vllm:kv_cache_usage_perc") == 0
    assert narrow.metric(SUCCESS, finished_reason="abort") == aborted + 1


def test_a_client_that_leaves_before_its_answer(narrow: Server) -> None:
    aborted = narrow.metric(SUCCESS, finished_reason="abort")
    with pytest.raises(httpx.ReadTimeout), narrow.client(headers=KEYS[0][0]) as client:
        client.post(PATH, json=body(max_tokens=LONGEST), timeout=1)
    narrow.wait_for_metric(RUNNING, lambda value: value == 0)
    assert narrow.metric(SUCCESS, finished_reason="abort") == aborted + 1


def test_a_full_queue_and_an_engine_that_dies(narrow: Server) -> None:
    """The last test of this server."""
    begun, lines = threading.Event(), []

    def read() -> None:
        asked = body(max_tokens=LONGEST, stream=True)
        with narrow.client(headers=KEYS[0][0]) as client, client.stream("POST", PATH, json=asked) as response:
            for line in response.iter_lines():
                lines.append(line)
                begun.set()

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        assert begun.wait(20)
        waiting = pool.submit(narrow.post, PATH, body(), headers=KEYS[0][0])
        narrow.wait_for_metric("vllm:num_requests_waiting", lambda value: value == 1)
        refused = narrow.post(PATH, body(), headers=KEYS[0][0])
        check_error(refused, 503, "overloaded_error")
        assert int(refused.headers["retry-after"]) > 0
        children = narrow.children()
        narrow.engine().kill()
        reading.result(10)
        check_error(waiting.result(10), 503, "overloaded_error", "engine")
    *events, last = events_of("\n".join([*lines, ""]))
    assert last["type"] == "error" and last.keys() == {"type", "error"}
    TypeAdapter(messages_answer.MessageStreamEvent).validate_python(last, strict=True)
    assert last["error"]["type"] == "overloaded_error" and "engine" in last["error"]["message"]
    assert "error" not in [event["type"] for event in events]
    narrow.wait_for_end(children, status=None)
