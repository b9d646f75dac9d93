"""Whatever is asked for, the joined stream is the plain response."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.tokenizer import EOS_ID
from tests.conftest import MakeCheckpoint
from tests.server.launch import Launch, user
from tests.server.streams import read_events

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Fields = dict[str, Any]

# Tokens of single bytes, from which characters come whole, in parts, or never.
BYTES = [EOS_ID + 1 + byte for byte in "é東🌸a ".encode()]
STOPS = ["e", "a", " ", "th", "n ", "aa", "a a", "é", "東", "🌸", "\N{REPLACEMENT CHARACTER}", "never to come"]
EXAMPLES = settings(max_examples=120, derandomize=True, deadline=None)


def _optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


SHARED: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 24),
    "min_tokens": _optional(st.just(1)),
    "n": _optional(st.integers(1, 3)),
    "seed": st.integers(0, 2**31),
    "temperature": st.sampled_from([0.0, 0.7, 1.5, 5.0]),
    "stop": _optional(st.sampled_from(STOPS) | st.lists(st.sampled_from(STOPS), max_size=4)),
    "stop_token_ids": _optional(st.lists(st.sampled_from([*BYTES, *range(260, 700)]), max_size=40)),
    "include_stop_str_in_output": _optional(st.booleans()),
    "allowed_token_ids": _optional(st.just(BYTES) | st.just([*BYTES, EOS_ID])),
    "return_token_ids": _optional(st.booleans()),
    "skip_special_tokens": _optional(st.booleans()),
    "ignore_eos": _optional(st.booleans()),
}
OPTIONS = st.sampled_from([None, {}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])
CHATS = st.fixed_dictionaries({**SHARED, "top_logprobs": _optional(st.integers(0, 4))})
TEXTS = st.fixed_dictionaries({**SHARED, "logprobs": _optional(st.integers(0, 4))})


@pytest.fixture(scope="module")
def client(launch: Launch, checkpoint: MakeCheckpoint) -> Iterator[httpx.Client]:
    """Of a server that caches no prompts, so that the same request uses the same tokens each time."""
    with launch(checkpoint(), "--no-enable-prefix-caching").client() as client:
        yield client


def both(client: httpx.Client, path: str, body: Fields, options: Fields | None) -> tuple[Fields, list[Fields]]:
    """A request's plain response and its stream."""
    plain = client.post(path, json=body)
    streamed = client.post(path, json={**body, "stream": True, "stream_options": options})
    assert plain.status_code == streamed.status_code == 200, (plain.text, streamed.text)
    return plain.json(), read_events(streamed.text)


def check_usage(chunks: list[Fields], plain: Fields, options: Fields | None) -> list[Fields]:
    """Usage comes where it was asked for; returns the chunks that have choices."""
    assert len({chunk["id"] for chunk in chunks}) == 1
    if not options:
        assert not any("usage" in chunk for chunk in chunks)
        return chunks
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"] == plain["usage"]
    if "continuous_usage_stats" in options:
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and chunks[-1]["usage"] == plain["usage"]
    else:
        assert all(chunk["usage"] is None for chunk in chunks)
    return chunks


def parts_of(chunks: list[Fields], index: int) -> list[Fields]:
    """The pieces of one choice, which end with its only finish reason."""
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
    assert [part["finish_reason"] is not None for part in parts] == [False] * (len(parts) - 1) + [True]
    return parts


def check_end(parts: list[Fields], choice: Fields, body: Fields) -> None:
    """The choice ends as the plain one does, and has its token ids where they were asked for."""
    last = parts[-1]
    assert (last["finish_reason"], last["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
    assert ("token_ids" in choice) == bool(body["return_token_ids"])
    if "token_ids" in choice:
        assert [token for part in parts for token in part.get("token_ids", [])] == choice["token_ids"]
        assert 1 <= len(choice["token_ids"]) <= body["max_tokens"]


def check_stop(text: str, choice: Fields, body: Fields) -> None:
    """A text holds no stop string, except at its end where that was asked for."""
    stops = [body["stop"]] if isinstance(body["stop"], str) else body["stop"] or []
    reason = choice["stop_reason"]
    if isinstance(reason, str) and body["include_stop_str_in_output"]:
        assert reason in stops and text.endswith(reason)
        text = text[:-1]
    if not body["min_tokens"]:
        assert not any(stop in text for stop in stops)


def assert_close(found: Any, wanted: Any) -> None:
    """Equal, but for what the order of a sum makes of a log probability."""
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_close(found[key], wanted[key])
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-3)
    else:
        assert found == wanted


@EXAMPLES
@given(fields=CHATS, options=OPTIONS)
def test_chat(client: httpx.Client, fields: Fields, options: Fields | None) -> None:
    asked = fields["top_logprobs"] is not None
    body = {**fields, "logprobs": asked, "messages": [user("Tell me a story.")]}
    plain, chunks = both(client, CHAT, body, options)
    chunks = check_usage(chunks, plain, options)
    assert [choice["index"] for choice in plain["choices"]] == list(range(body["n"] or 1))
    for choice in plain["choices"]:
        parts = parts_of(chunks, choice["index"])
        assert [part["delta"].get("role") for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
        text = choice["message"]["content"]
        assert "".join(part["delta"].get("content", "") for part in parts) == text
        check_end(parts, choice, body)
        check_stop(text, choice, body)
        entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert_close(entries, choice["logprobs"]["content"] if asked else [])
        if asked:
            assert "".join(entry["token"] for entry in entries) == text
            assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text
            assert len(choice.get("token_ids", entries)) == len(entries)


@EXAMPLES
@given(fields=TEXTS, prompts=st.sampled_from(["Hello", ["Once upon", "Water é"], [[1, 400], [1, 401], [1, 402]]]),
       options=OPTIONS)  # fmt: skip
def test_completions(client: httpx.Client, fields: Fields, prompts: Any, options: Fields | None) -> None:
    body = {**fields, "prompt": prompts}
    plain, chunks = both(client, COMPLETIONS, body, options)
    chunks = check_usage(chunks, plain, options)
    number = (body["n"] or 1) * (1 if isinstance(prompts, str) else len(prompts))
    assert [choice["index"] for choice in plain["choices"]] == list(range(number))
    for choice in plain["choices"]:
        parts = parts_of(chunks, choice["index"])
        assert "".join(part["text"] for part in parts) == choice["text"]
        check_end(parts, choice, body)
        check_stop(choice["text"], choice, body)
        if body["logprobs"] is None:
            assert choice["logprobs"] is None and not any(part["logprobs"] for part in parts)
            continue
        for key, values in choice["logprobs"].items():
            assert_close([value for part in parts if part["logprobs"] for value in part["logprobs"][key]], values)
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        lengths = [len(token) for token in choice["logprobs"]["tokens"]]
        assert choice["logprobs"]["text_offset"] == [sum(lengths[:place]) for place in range(len(lengths))]
