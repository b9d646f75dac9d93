"""`POST /v1/chat/completions` as OpenAI's client and as a plain one see it."""

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.errors import NOT_AVAILABLE_ANYWHERE, check_error, error_of
from tests.server.launch import Server, assistant, data_url, image_part, text_part, user

PATH = "/v1/chat/completions"
QUESTION = [user("Tell me a story about the sea, please.")]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat(server: Server, messages: list[Any] = QUESTION, **fields: Any) -> httpx.Response:
    return server.post(PATH, {"temperature": 0, "max_tokens": 16, "messages": messages} | fields)


def answer(server: Server, messages: list[Any] = QUESTION, **fields: Any) -> dict[str, Any]:
    response = chat(server, messages, **fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def text_of(response: dict[str, Any]) -> str:
    return str(response["choices"][0]["message"]["content"])


def events(server: Server, body: dict[str, Any], path: str = PATH) -> list[dict[str, Any]]:
    """The chunks of a stream whose framing was checked."""
    response = server.post(path, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_form_of_a_response(server: Server) -> None:
    response = answer(server, max_tokens=4)
    assert response["id"].startswith("chatcmpl-")
    assert response["object"] == "chat.completion"
    assert response["model"] == "vlm"
    assert isinstance(response["created"], int) and response["system_fingerprint"].startswith("fp_")
    (choice,) = response["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert choice["message"].items() >= {"role": "assistant", "refusal": None}.items()
    usage = response["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4
    assert usage["prompt_tokens_details"].keys() == {"cached_tokens", "image_tokens"}
    assert answer(server, max_tokens=4)["id"] != response["id"]


def test_form_of_a_stream(server: Server) -> None:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 8}
    chunks = events(server, body)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert not any("role" in choice["delta"] for choice in choices[1:])
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("continuous", [False, True])
def test_usage_of_a_stream(server: Server, continuous: bool) -> None:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 8}
    options = {"include_usage": True} | ({"continuous_usage_stats": True} if continuous else {})
    *chunks, last = events(server, body | {"stream_options": options})
    assert last["choices"] == []
    plain = answer(server, max_tokens=8)["usage"]
    assert {**last["usage"], "prompt_tokens_details": None} == {**plain, "prompt_tokens_details": None}
    assert all(chunk["choices"] and "usage" in chunk for chunk in chunks)
    if continuous:
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 8
    else:
        assert all(chunk["usage"] is None for chunk in chunks)


STREAMED: list[dict[str, Any]] = [
    {},
    {"max_tokens": 64},
    {"n": 2, "temperature": 1, "seed": 5},
    {"n": 3},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 3, "n": 2, "temperature": 0.8, "seed": 1},
    {"stop": "e"},
    {"stop": ["e", "a"], "include_stop_str_in_output": True},
    {"stop": [" c", "never"], "logprobs": True, "top_logprobs": 1, "max_tokens": 40},
    {"stop": ["n " * 40], "max_tokens": 40},
    {"skip_special_tokens": False, "max_tokens": 40},
    {"temperature": 5, "seed": 3, "max_tokens": 200, "logprobs": True, "top_logprobs": 2},
]


@pytest.mark.parametrize("fields", STREAMED, ids=json.dumps)
def test_joined_stream_is_the_plain_response(server: Server, fields: dict[str, Any]) -> None:
    plain = answer(server, **fields, return_token_ids=True)
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 16} | fields
    joined: dict[int, dict[str, Any]] = {}
    for chunk in events(server, body | {"return_token_ids": True}):
        for part in chunk["choices"]:
            one = joined.setdefault(part["index"], {"content": "", "token_ids": [], "logprobs": None, "end": []})
            one["content"] += part["delta"].get("content") or ""
            one["token_ids"] += part.get("token_ids") or []
            if part["logprobs"] is not None:
                one["logprobs"] = (one["logprobs"] or []) + part["logprobs"]["content"]
            if part["finish_reason"] is not None:
                one["end"].append((part["finish_reason"], part["stop_reason"]))
    assert joined.keys() == set(range(fields.get("n", 1)))
    for choice in plain["choices"]:
        one = joined[choice["index"]]
        assert one["content"] == choice["message"]["content"]
        assert one["token_ids"] == choice["token_ids"]
        assert one["end"] == [(choice["finish_reason"], choice["stop_reason"])]
        wanted = choice["logprobs"] and choice["logprobs"]["content"]
        assert [e["token"] for e in one["logprobs"] or []] == [e["token"] for e in wanted or []]
        for found, entry in zip(one["logprobs"] or [], wanted or [], strict=True):
            assert found["bytes"] == entry["bytes"]
            assert found["logprob"] == pytest.approx(entry["logprob"], abs=1e-3)


def test_logprobs(server: Server) -> None:
    choice = answer(server, logprobs=True, top_logprobs=4, max_tokens=60)["choices"][0]
    assert choice["logprobs"].keys() == {"content", "refusal"} and choice["logprobs"]["refusal"] is None
    entries, text = choice["logprobs"]["content"], choice["message"]["content"]
    assert "".join(entry["token"] for entry in entries) == text
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text
    assert len(entries) == 60
    for entry in entries:
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        top = entry["top_logprobs"]
        assert len(top) == 4 and all(rival.keys() == {"token", "logprob", "bytes"} for rival in top)
        assert [rival["logprob"] for rival in top] == sorted((r["logprob"] for r in top), reverse=True)
        assert top[0]["logprob"] == entry["logprob"] <= 0  # greedy: the best is the one that was taken
        assert sum(math.exp(rival["logprob"]) for rival in top) <= 1.0001
    none = answer(server, logprobs=True, max_tokens=2)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in none] == [[], []]


def test_logprobs_join_to_the_text_under_stop_strings(server: Server) -> None:
    whole = text_of(answer(server, max_tokens=40))
    for stop in (whole[10:12], whole[7:8], whole[15:22]):
        for include in (False, True):
            choice = answer(
                server, max_tokens=40, stop=stop, include_stop_str_in_output=include, logprobs=True
            )["choices"][0]  # fmt: skip
            assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == choice["message"]["content"]


def test_stop_strings(server: Server) -> None:
    whole = text_of(answer(server, max_tokens=40))
    stop = whole[12:15]
    end = whole.index(stop)
    cut = answer(server, max_tokens=40, stop=[stop, "\0never"])["choices"][0]
    assert cut["message"]["content"] == whole[:end]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    kept = answer(server, max_tokens=40, stop=stop, include_stop_str_in_output=True)
    assert text_of(kept) == whole[: end + len(stop)]
    missed = answer(server, max_tokens=40, stop="\0never")["choices"][0]
    assert (missed["message"]["content"], missed["finish_reason"]) == (whole, "length")


def test_stop_token_ids_and_min_tokens(server: Server) -> None:
    whole = answer(server, return_token_ids=True)
    ids = whole["choices"][0]["token_ids"]
    place = next(i for i in range(4, 16) if ids.index(ids[i]) == i)
    stopped = answer(server, stop_token_ids=[ids[place]], return_token_ids=True)["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", ids[place])
    assert stopped["token_ids"] == ids[: place + 1]
    assert text_of(whole).startswith(stopped["message"]["content"])
    later = answer(server, stop_token_ids=[ids[place]], min_tokens=place + 2, return_token_ids=True)["choices"][0]
    assert len(later["token_ids"]) >= place + 2


def test_max_tokens(server: Server) -> None:
    body = {"messages": QUESTION, "temperature": 0}
    assert server.post(PATH, body | {"max_tokens": 3}).json()["usage"]["completion_tokens"] == 3
    assert server.post(PATH, body | {"max_completion_tokens": 3}).json()["usage"]["completion_tokens"] == 3
    both = server.post(PATH, body | {"max_completion_tokens": 3, "max_tokens": 3})
    assert both.json()["usage"]["completion_tokens"] == 3


def test_reply_without_limit_fills_the_context(server: Server) -> None:
    response = server.post(PATH, {"messages": [user("the red house " * 300)], "temperature": 0}).json()
    assert response["usage"]["total_tokens"] == 2048
    assert response["choices"][0]["finish_reason"] == "length"


def test_seeds(server: Server) -> None:
    fields = {"temperature": 1.5, "max_tokens": 20, "n": 3}
    first, again, other = (answer(server, **fields, seed=seed) for seed in (7, 7, 8))
    texts = [[choice["message"]["content"] for choice in r["choices"]] for r in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3
    unseeded = {text_of(answer(server, temperature=1.5, max_tokens=20)) for _ in range(3)}
    assert len(unseeded) == 3


def test_choosing_tokens(server: Server) -> None:
    plain = answer(server, return_token_ids=True)["choices"][0]["token_ids"]
    only = answer(server, allowed_token_ids=[400, 401], return_token_ids=True)["choices"][0]["token_ids"]
    assert set(only) <= {400, 401}
    forced = answer(server, logit_bias={"450": 100}, return_token_ids=True)["choices"][0]["token_ids"]
    assert set(forced) == {450}
    banned = answer(server, logit_bias={str(plain[0]): -100}, return_token_ids=True)["choices"][0]["token_ids"]
    assert banned[0] != plain[0]
    narrow = answer(server, temperature=2, top_k=1, return_token_ids=True)["choices"][0]["token_ids"]
    assert narrow == plain
    penalized = answer(server, repetition_penalty=2.0, max_tokens=40, return_token_ids=True)["choices"][0]["token_ids"]
    assert len(set(penalized)) == 40
    word = server.post("/tokenize", {"prompt": "image", "add_special_tokens": False}).json()["tokens"]
    assert len(word) == 1
    fields = {"logit_bias": {str(word[0]): 50}, "max_tokens": 4}
    assert text_of(answer(server, **fields)).strip() == "image image image image"
    assert "image" not in text_of(answer(server, **fields, bad_words=["image"]))


def test_templates(server: Server) -> None:
    def prompt(messages: list[Any], **fields: Any) -> str:
        fields = {"max_tokens": 1, "return_token_ids": True, **fields}
        ids = answer(server, messages, **fields)["prompt_token_ids"]
        return str(server.post("/detokenize", {"tokens": ids}).json()["prompt"])

    assert prompt([user("Hi")]).endswith("USER: Hi ASSISTANT:")
    assert prompt([user("Hi")], add_generation_prompt=False).endswith("USER: Hi ")
    continued = prompt([user("Hi"), assistant("I am")], continue_final_message=True)
    assert continued.endswith("ASSISTANT: I am")
    assert "<s>" not in prompt([user("Hi")], add_special_tokens=False)
    assert prompt([user("Hi " * 50)], truncate_prompt_tokens=5).count("ASSISTANT") <= 1
    assert answer(server, [user("Hi " * 50)], truncate_prompt_tokens=5)["usage"]["prompt_tokens"] == 5
    assert prompt([user("Hi")], chat_template_kwargs={"unused": 1}) == prompt([user("Hi")])
    for role in ("system", "developer"):
        assert "Be brief." in prompt([{"role": role, "content": "Be brief."}, user("Hi")])


def test_prompt_logprobs(server: Server) -> None:
    response = answer(server, prompt_logprobs=2, return_token_ids=True)
    ids, entries = response["prompt_token_ids"], response["prompt_logprobs"]
    assert len(entries) == len(ids) and entries[0] is None
    for token, entry in zip(ids[1:], entries[1:], strict=True):
        assert 2 <= len(entry) <= 3
        row = entry[str(token)]
        assert row.keys() == {"logprob", "rank", "decoded_token"} and row["logprob"] <= 0 and row["rank"] >= 1
        assert {other["rank"] for other in entry.values()} >= {1, 2}


def test_cache_salt(server: Server) -> None:
    messages = [user("A prompt of more than one block, that nobody has asked before in this file. " * 3)]

    def cached(**fields: Any) -> int:
        usage = answer(server, messages, max_tokens=1, **fields)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached() == 0
    assert cached() > 0
    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") > 0
    assert cached(cache_salt="yours") == 0


def test_fields_without_effect(server: Server) -> None:
    fields = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "presence_penalty": 0,
        "an_unknown_field": {"x": 1}, "logprobs": None, "stop": None, "stream": None, "priority": -3, "n": None,
    }  # fmt: skip
    assert text_of(answer(server, **fields)) == text_of(answer(server))


async def test_openai_client(server: Server, photo_files: list[Path]) -> None:
    messages: Any = [user(text_part("What is this?"), image_part(data_url(photo_files[0])))]
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        options: Any = {"model": "vlm", "messages": messages, "temperature": 0, "max_tokens": 12}
        whole = await client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
        assert whole.usage is not None and whole.choices[0].logprobs is not None
        text = ""
        async for chunk in await client.chat.completions.create(**options, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == whole.choices[0].message.content
        async with client.chat.completions.stream(**options | {"stop": [" "]}) as stream:
            async for event in stream:
                assert event.type
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == text.partition(" ")[0]


def test_openai_client_errors(client: OpenAI) -> None:
    messages: Any = QUESTION
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="vlm", messages=messages, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-nothing", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        list(client.chat.completions.create(model="vlm", messages=messages, stream=True, top_p=3))


BAD_FIELDS: list[tuple[dict[str, Any], str, tuple[object, ...]]] = [
    ({"temperature": 101}, "temperature", (101, 100)),
    ({"temperature": -0.5}, "temperature", (-0.5, 0)),
    ({"temperature": "1"}, "temperature", ("number", "'1'")),
    ({"temperature": True}, "temperature", ("number", "True")),
    ({"top_p": 0}, "top_p", (0, 1)),
    ({"top_p": 1.5}, "top_p", (1.5, 1)),
    ({"top_k": -2}, "top_k", (-2, -1)),
    ({"min_p": 2}, "min_p", (2, 1)),
    ({"n": 0}, "n", (0, 1)),
    ({"n": 17}, "n", (17, 16)),
    ({"max_tokens": 0}, "max_tokens", (0, 1)),
    ({"max_tokens": 1.5}, "max_tokens", ("integer", 1.5)),
    ({"max_tokens": 5000}, "max_tokens", (5000, 2048)),
    ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", ("max_completion_tokens", 0, 1)),
    ({"max_tokens": None, "max_completion_tokens": 5000}, "max_completion_tokens", (5000, 2048)),
    ({"max_completion_tokens": 3}, "max_tokens", ("max_completion_tokens",)),
    ({"min_tokens": 30}, "min_tokens", (30, 16)),
    ({"presence_penalty": 3}, "presence_penalty", (3, 2)),
    ({"frequency_penalty": -3}, "frequency_penalty", (-3, -2)),
    ({"repetition_penalty": 0}, "repetition_penalty", (0,)),
    ({"seed": 2**70}, "seed", ("seed",)),
    ({"stop": ["a"] * 17}, "stop", (17, 16)),
    ({"stop": ""}, "stop", (1024,)),
    ({"stop": "a" * 1025}, "stop", (1024,)),
    ({"stop": 5}, "stop", ("string", 5)),
    ({"stop_token_ids": [-1]}, "stop_token_ids", ()),
    ({"stop_token_ids": [704]}, "stop_token_ids", (704, 703)),
    ({"allowed_token_ids": []}, "allowed_token_ids", ("empty",)),
    ({"allowed_token_ids": [99999]}, "allowed_token_ids", (99999, 703)),
    ({"logit_bias": {"x": 1}}, "logit_bias", ("token ids",)),
    ({"logit_bias": {"5": 101}}, "logit_bias", (101, 100)),
    ({"logit_bias": {"99999": 1}}, "logit_bias", (99999, 703)),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5", ("number", "'1'")),
    ({"bad_words": [""]}, "bad_words", (128,)),
    ({"logprobs": 5}, "logprobs", ("boolean", 5)),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", (21, 20)),
    ({"top_logprobs": 3}, "top_logprobs", ("logprobs",)),
    ({"prompt_logprobs": 21}, "prompt_logprobs", (21, 20)),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", ("stream",)),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", (0, 1)),
    ({"truncate_prompt_tokens": 2**31}, "truncate_prompt_tokens", (2**31 - 1,)),
    ({"priority": 2**40}, "priority", (2**40, 2**31)),
    ({"cache_salt": ""}, "cache_salt", (1,)),
    ({"stream": "yes"}, "stream", ("boolean", "'yes'")),
    ({"stream_options": {"include_usage": True}}, "stream_options", ("stream",)),
    ({"stream": True, "stream_options": 5}, "stream_options", ("object", 5)),
    ({"user": 5}, "user", ("string", 5)),
    ({"metadata": "x"}, "metadata", ("object", "'x'")),
    ({"model": 5}, "model", ("string", 5)),
    ({"messages": []}, "messages", (1, 0)),
    ({"messages": "x"}, "messages", ("array", "'x'")),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages.0.role", ("'user'", "'alien'")),
    ({"messages": [{"role": "user"}]}, "messages", ("user", "content")),
    ({"messages": [{"role": "user", "content": None}]}, "messages", ("user", "content")),
    ({"messages": [user("a"), {"role": "user", "content": 5}]}, "messages.1.content", ("string", 5)),
    ({"messages": [user({"type": "audio"})]}, "messages.0.content.0.type", ("'image_url'", "'audio'")),
    ({"messages": [user({"type": "text"})]}, "messages.0.content.0.text", ("required",)),
    (
        {"messages": [user({"type": "image_url", "image_url": "http://x/y.png"})]},
        "messages.0.content.0.image_url",
        ("object", "http://x/y.png"),
    ),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "x", "detail": "no"}})]},
     "messages.0.content.0.image_url.detail", ("'auto'", "'no'")),
    ({"messages": [user("a <image> b")]}, "messages", ("<image>",)),
    ({"messages": [user(text_part("<image>"))]}, "messages", ("<image>",)),
    ({"messages": [{"role": "system", "content": "<image>"}, user("a")]}, "messages", ("<image>",)),
    ({"messages": [user("long " * 3000)]}, "messages", (2048,)),
    ({"messages": [user(*[image_part("data:image/png;base64,AAAA")] * 129)]}, "messages", (129, 128)),
    ({"messages": [user(*[image_part("data:image/png;base64,AAAA")] * 2), user("x")] * 70}, "messages", (140, 128)),
    ({"messages": [{"role": "assistant", "content": [image_part("http://x")]}]}, "messages", ("assistant", "images")),
    ({"continue_final_message": True}, "continue_final_message", ("assistant",)),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message",
     ("add_generation_prompt",)),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", ("tokenize",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "words"), BAD_FIELDS, ids=lambda value: json.dumps(value, default=str)[:60]
)
def test_bad_fields(server: Server, fields: dict[str, Any], param: str, words: tuple[object, ...]) -> None:
    check_error(chat(server, **fields), param, *words)


NOT_AVAILABLE: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {}}, "response_format"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"echo": True}, "echo"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"use_beam_search": True}, "use_beam_search"),
    *NOT_AVAILABLE_ANYWHERE,
    ({"chat_template": "{{ messages }}"}, "chat_template"),
]


@pytest.mark.parametrize(("fields", "param"), NOT_AVAILABLE, ids=lambda value: json.dumps(value)[:60])
def test_what_is_not_available_says_so(server: Server, fields: dict[str, Any], param: str) -> None:
    error = check_error(chat(server, **fields), param)
    assert any(words in error["message"] for words in ("not available", "not allowed"))


IMAGES: list[tuple[str, str]] = [
    ("data:image/png;base64,AAAA", "JPEG, PNG"),
    ("data:image/png;base64,@@@", "base64"),
    ("data:image/png,raw", "data URL"),
    ("data:text/plain;base64,AAAA", "data URL"),
    ("data:image/svg+xml;base64,PHN2Zy8+", "JPEG, PNG"),
    ("ftp://example.com/x.png", "'ftp:"),
    ("", "not allowed"),
    ("http://", "not valid"),
    ("file:///etc/passwd", "--allowed-local-media-path"),
    ("http://127.0.0.1:1/x.png", "not public"),
    ("http://localhost:1/x.png", "not public"),
    ("http://[::1]:1/x.png", "not public"),
    ("http://169.254.169.254/latest/meta-data", "not public"),
    ("http://user:secret@example.com/", "password"),
    ("http://example.com/" + "a" * 9000, "8192"),
]


def test_the_bad_one_of_several_images_is_told(server: Server, photo_files: list[Path]) -> None:
    pictures = [image_part(data_url(photo_files[0])), image_part("data:image/png;base64,AAAA")]
    check_error(chat(server, [user(*pictures, text_part("?"))]), "messages", "image 2 of 2: the image is not JPEG")


@pytest.mark.parametrize(("url", "word"), IMAGES, ids=lambda value: value[:30])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_images(server: Server, url: str, word: str, stream: bool) -> None:
    error = check_error(chat(server, [user(image_part(url), text_part("?"))], stream=stream), "messages", word)
    assert "secret" not in error["message"]


def test_a_damaged_image(server: Server, photo_files: list[Path]) -> None:
    cut = photo_files[0].read_bytes()[:5000]
    url = f"data:image/jpeg;base64,{base64.b64encode(cut).decode()}"
    check_error(chat(server, [user(image_part(url))]), "messages", "image")


BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"null", None),
    (b"[]", None),
    (b'"text"', None),
    (b'{"messages":', None),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -Infinity}', "temperature"),
    (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": Infinity}', "max_tokens"),
    (b'{"messages": [{"role": "user", "content": "x"}], "top_p": 1e999}', "top_p"),
    (b"[" * 100_000, None),
    (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    (b'{"messages": [{"role": "user", "content": "x"}], "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, None),
    (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', None),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
    (b'{"messages": [{"role": "user", "content": "' + b"\xc3" * 70_000 + b'"}]}', None),
]


@pytest.mark.parametrize(("body", "param"), BODIES, ids=lambda value: str(value)[:60])
def test_malformed_bodies(server: Server, body: bytes, param: str | None) -> None:
    with server.client() as client:
        response = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
        check_error(response, param)
        assert client.get("/health").status_code == 200


def test_other_statuses(server: Server) -> None:
    check_error(chat(server, model="nothing"), "model", "'nothing'", f"{server.names[0]} is served", status=404)
    with server.client() as client:
        assert error_of(client.get("/v1/nothing"), 404)["message"].startswith("GET /v1/nothing is not served")
        without_v1 = error_of(client.post("/chat/completions"), 404)["message"]
        assert without_v1 == "POST /chat/completions is not served: did you mean /v1/chat/completions?"
        wrong_method = client.get(PATH)
        assert error_of(wrong_method, 405)["message"] == f"GET {PATH} is not served: use POST"
        assert wrong_method.headers["allow"] == "POST"
        body = json.dumps({"messages": QUESTION, "max_tokens": 1})
        error_of(client.post(PATH, content=body, headers={"Content-Type": "text/plain"}), 415)
        error_of(client.post(PATH, data={"messages": "x"}), 415)
        fine = client.post(PATH, content=body, headers={"Content-Type": "application/json; charset=utf-8"})
        assert fine.status_code == 200


def nested(depth: int) -> list[Any]:
    return [] if depth == 0 else [nested(depth - 1)]


def test_a_bad_request_disturbs_nobody(server: Server, photo_files: list[Path]) -> None:
    before = text_of(answer(server, [user(image_part(data_url(photo_files[1])))]))
    for fields, _, _ in BAD_FIELDS[:8]:
        assert chat(server, **fields).status_code == 400
    assert text_of(answer(server, [user(image_part(data_url(photo_files[1])))])) == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [{}] * 200_000}),
        ("/v1/completions", {"prompt": [5] * 200_000}),
        ("/v1/completions", {"prompt": [5] * 90_000 + ["x"]}),
        ("/v1/completions", {"prompt": "a", "stop": [1] * 90_000}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): "x" for i in range(90_000)}}),
        ("/v1/completions", {"prompt": "a", "max_tokens": -1}),
        ("/tokenize", {"prompt": "a", "other": [[]] * 200_000}),
        ("/detokenize", {"tokens": [5] * 20_000}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "metadata": {"a": [nested(50)] * 2000}}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "metadata": {"a": [{"b": {}}] * 40_000}}),
        ("/v1/completions", {"prompt": "a", "service_tier": "x" * 1_000_000}),
        ("/v1/completions", {"prompt": "a", "response_format": {"type": [["x"] * 1000]}}),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": {"description": "x" * 1_000_000}}}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"5": 1, "05": -3}}),
        ("/v1/completions", {"prompt": ["a b c " * 20] * 32, "n": 16, "prompt_logprobs": 20, "max_tokens": 1}),
        ("/v1/completions", {"prompt": ["a b c " * 20] * 32, "n": 16, "logprobs": 20, "echo": True, "max_tokens": 1}),
        ("/v1/completions", {"prompt": ["a"] * 128, "n": 16, "max_tokens": 1}),
        (
            "/v1/chat/completions",
            {
                "messages": [user("Hi")],
                "tools": [{"type": "function", "function": {"name": "f", "description": "x" * 1_000_000}}],
            },
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 500}] * 200}),
        ("/v1/chat/completions", {"messages": [user("Hi")], "min_tokens": 100_000}),
        ("/v1/chat/completions", {"messages": [user("Hi")], "chat_template_kwargs": {"self": 1}}),
        ("/v1/chat/completions", {"messages": [user("Hi")], "chat_template_kwargs": {"conversations": 1}}),
        (
            "/v1/chat/completions",
            {"messages": [user(text_part("<im"), text_part("age>"))]},
        ),
        ("/tokenize", {"messages": [user(text_part("<im"), text_part("age>"))]}),
        ("/tokenize", {"messages": [user("Hi")], "truncate_prompt_tokens": 3}),
    ],
)
def test_bodies_that_would_cost_much_or_mean_nothing(server: Server, path: str, body: dict[str, Any]) -> None:
    error_of(server.post(path, body), 400)
