"""`POST /v1/completions` as OpenAI's client and as a plain one see it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.conftest import MakeCheckpoint
from tests.oracle import hf_generate, hf_logits
from tests.server.errors import check_error, error_of
from tests.server.launch import Server

PATH = "/v1/completions"
PROMPT = "Several plates of food have been placed on"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def ids(server: Server) -> list[int]:
    tokens: list[int] = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    return tokens


def ask(server: Server, prompt: Any = PROMPT, **fields: Any) -> httpx.Response:
    return server.post(PATH, {"prompt": prompt, "temperature": 0, "max_tokens": 12} | fields)


def complete(server: Server, prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
    response = ask(server, prompt, **fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def texts(response: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in response["choices"]]


def events(server: Server, **fields: Any) -> list[dict[str, Any]]:
    blocks = ask(server, fields.pop("prompt", PROMPT), stream=True, **fields).text.split("\n\n")
    assert blocks.pop() == "" and blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_form(server: Server) -> None:
    response = complete(server)
    assert response["id"].startswith("cmpl-")
    assert response["object"] == "text_completion"
    assert response["model"] == "vlm" and response["system_fingerprint"]
    (choice,) = response["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert response["usage"]["completion_tokens"] == 12
    assert len(server.post(PATH, {"prompt": PROMPT, "temperature": 0}).json()["choices"][0]["text"]) > 0
    assert server.post(PATH, {"prompt": PROMPT}).json()["usage"]["completion_tokens"] == 16  # OpenAI's default


def test_equals_transformers(server: Server, checkpoint: MakeCheckpoint, ids: list[int]) -> None:
    choice = complete(server, ids, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == ids
    assert choice["token_ids"] == hf_generate(checkpoint(), ids, (), 12)


def test_prompts_of_every_kind(server: Server, ids: list[int]) -> None:
    other = server.post("/tokenize", {"prompt": "Water boils"}).json()["tokens"]
    (text,), (second,) = texts(complete(server)), texts(complete(server, "Water boils"))
    assert text != second
    assert texts(complete(server, ids)) == [text]
    assert texts(complete(server, [PROMPT])) == [text]
    assert texts(complete(server, [PROMPT, "Water boils", PROMPT])) == [text, second, text]
    assert texts(complete(server, [ids, other])) == [text, second]
    both = complete(server, [ids, other], n=2)
    assert texts(both) == [text, text, second, second]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert both["usage"]["prompt_tokens"] == len(ids) + len(other)
    assert both["usage"]["completion_tokens"] == 4 * 12
    assert len(complete(server, ["a"] * 128, max_tokens=1)["choices"]) == 128


def test_cached_tokens_of_several_prompts(server: Server) -> None:
    prompts = [f"{word} is what this prompt begins with. " * 4 for word in ("Apple", "Bread", "Cheese")]
    assert complete(server, prompts, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    alone = [complete(server, p, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"] for p in prompts]
    assert all(alone)
    again = complete(server, prompts, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert again == sum(alone)


def test_echo(server: Server, ids: list[int]) -> None:
    (text,) = texts(complete(server))
    assert texts(complete(server, echo=True)) == [PROMPT + text]
    assert texts(complete(server, ids, echo=True)) == [PROMPT + text]
    nothing = complete(server, echo=True, max_tokens=0)
    assert texts(nothing) == [PROMPT]
    assert nothing["usage"]["completion_tokens"] == 0
    assert nothing["choices"][0]["finish_reason"] == "length"
    streamed = events(server, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == PROMPT + text


def test_logprobs(server: Server) -> None:
    choice = complete(server, logprobs=3, max_tokens=40)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(values) for values in logprobs.values()} == {40}
    assert "".join(logprobs["tokens"]) == choice["text"]
    offset = 0
    for token, found in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert found == offset
        offset += len(token)
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert 1 <= len(top) <= 4 and top[token] == logprob
    sampled = complete(server, logprobs=0, max_tokens=2)["choices"][0]["logprobs"]
    assert [len(top) for top in sampled["top_logprobs"]] == [1, 1]


def test_echo_with_logprobs(server: Server, checkpoint: MakeCheckpoint, ids: list[int]) -> None:
    choice = complete(server, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    found = choice["logprobs"]["token_logprobs"]
    assert len(found) == len(ids) and found[0] is None
    expected = hf_logits(checkpoint(), ids).log_softmax(-1)
    for place, (token, logprob) in enumerate(zip(ids[1:], found[1:], strict=True)):
        assert logprob == pytest.approx(float(expected[place, token]), abs=1e-3)
    more = complete(server, echo=True, logprobs=1)["choices"][0]
    assert "".join(more["logprobs"]["tokens"]) == more["text"]
    assert len(more["logprobs"]["tokens"]) == len(ids) + 12


def test_prompt_logprobs(server: Server, ids: list[int]) -> None:
    two = complete(server, [ids, ids[:5]], prompt_logprobs=0)["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in two] == [len(ids), 5]
    assert all(choice["prompt_logprobs"][0] is None for choice in two)
    for token, entry in zip(ids[1:], two[0]["prompt_logprobs"][1:], strict=True):
        assert list(entry) == [str(token)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "temperature": 1, "seed": 4},
        {"prompt": ["Hello", "Once upon a time"], "logprobs": 2},
        {"prompt": ["Hello", "Once"], "n": 2, "temperature": 2, "seed": 9, "max_tokens": 50},
        {"stop": ["a", "e"], "logprobs": 1, "max_tokens": 30},
        {"stop": ["a"], "include_stop_str_in_output": True},
        {"prompt": ["Hello", "Once"], "echo": True},
    ],
    ids=json.dumps,
)
def test_joined_stream_is_the_plain_response(server: Server, fields: dict[str, Any]) -> None:
    given = dict(fields)
    plain = complete(server, given.pop("prompt", PROMPT), **given, return_token_ids=True)
    *chunks, last = events(server, **fields, return_token_ids=True, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    for choice in plain["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part.get("token_ids", [])] == choice["token_ids"]
        assert [part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part] == [
            choice["prompt_token_ids"]
        ]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        if "logprobs" in fields:
            for key in ("tokens", "text_offset"):
                found = [value for part in parts if part["logprobs"] for value in part["logprobs"][key]]
                assert found == choice["logprobs"][key]


def test_text_offsets_of_a_stream_that_holds_back_the_end_of_a_token(server: Server) -> None:
    whole = complete(server, logprobs=0)["choices"][0]["logprobs"]
    token = next(token for token in whole["tokens"][2:-2] if len(token) > 2)
    chunks = events(server, logprobs=0, stop=token[1:] + "\0never")
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [offset for part in found if part for offset in part["text_offset"]] == whole["text_offset"]


def test_truncation_and_special_tokens(server: Server, ids: list[int]) -> None:
    choice = complete(server, truncate_prompt_tokens=4, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == ids[-4:]
    bare = complete(server, add_special_tokens=False, return_token_ids=True)["choices"][0]
    assert bare["prompt_token_ids"] == ids[1:]
    once = complete(server, f"<s>{PROMPT}", return_token_ids=True)["choices"][0]
    assert once["prompt_token_ids"].count(1) == 1


def test_openai_client(client: OpenAI, server: Server) -> None:
    whole = client.completions.create(model="vlm", prompt=PROMPT, temperature=0, max_tokens=12, logprobs=1)
    assert whole.choices[0].logprobs is not None and whole.usage is not None
    parts = client.completions.create(model="vlm", prompt=PROMPT, temperature=0, max_tokens=12, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


BAD: list[tuple[dict[str, Any], str, tuple[object, ...]]] = [
    ({"prompt": []}, "prompt", ("empty",)),
    ({"prompt": [[]]}, "prompt", ("empty",)),
    ({"prompt": [[1, 5], []]}, "prompt", ("empty",)),
    ({"prompt": ["a", [1]]}, "prompt.1", ("string",)),
    ({"prompt": [1, 99999]}, "prompt", (99999, 703)),
    ({"prompt": [1, -1]}, "prompt", (-1, 0)),
    ({"prompt": [1, 2**70]}, "prompt", (2**70, 703)),
    ({"prompt": 5}, "prompt", ("string", 5)),
    ({"prompt": None}, "prompt", ("string", "None")),
    ({"prompt": ["a"] * 129}, "prompt", (129, 128)),
    ({"prompt": "word " * 3000}, "prompt", (2048,)),
    ({"prompt": "x" * 200_000}, "prompt", (200_000,)),
    ({"prompt": "a typed <image> here"}, "prompt", ("image",)),
    ({"prompt": [1, 700]}, "prompt", ("image",)),
    ({"prompt": [1, *[700] * 16]}, "prompt", ("image",)),
    ({"max_tokens": 0}, "max_tokens", (0, 1)),
    ({"max_tokens": 4000}, "max_tokens", (4000, 2048)),
    ({"logprobs": 21}, "logprobs", (21, 20)),
    ({"logprobs": True}, "logprobs", ("integer", "True")),
    ({"echo": True, "stream": True, "logprobs": 1}, "echo", ("streamed",)),
    ({"suffix": "end"}, "suffix", ("not available",)),
    ({"best_of": 3}, "best_of", (3, "available")),
    ({"guided_choice": ["a"]}, "guided_choice", ("not available", "'choice'")),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", ("not available",)),
    ({"length_penalty": 0.5}, "length_penalty", ("only 1 is",)),
    ({"early_stopping": True}, "early_stopping", ("only false is",)),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens", ("only true is",)),
    ({"detokenize": False}, "detokenize", ("only true is",)),
    ({"reasoning_effort": "high"}, "reasoning_effort", ('only "none" is',)),
    ({"verbosity": "low"}, "verbosity", ('only "medium" is',)),
    ({"modalities": ["text", "audio"]}, "modalities", ('only ["text"] is',)),
    ({"prediction": {"type": "content", "content": "a"}}, "prediction", ("not available",)),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs", ("not available",)),
    ({"n": 100}, "n", (100, 16)),
]


def test_fields_that_change_nothing(server: Server) -> None:
    neutral = {"length_penalty": 1.0, "early_stopping": False, "spaces_between_special_tokens": True,
               "detokenize": True, "reasoning_effort": "none", "verbosity": "medium", "modalities": ["text"],
               "guided_json": None}  # fmt: skip
    plain, answer = (ask(server, prompt=PROMPT, temperature=0, **fields) for fields in ({}, neutral))
    assert answer.status_code == 200
    assert answer.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=lambda value: json.dumps(value)[:60])
def test_bad_fields(server: Server, fields: dict[str, Any], param: str, words: tuple[object, ...]) -> None:
    check_error(ask(server, **{"prompt": PROMPT, **fields}), param, *words)


def test_malformed(server: Server) -> None:
    check_error(server.post(PATH, {}), "prompt", "required")
    with server.client(headers={"Content-Type": "application/json"}) as client:
        for body in (b"", b"{", b"[]", b'{"prompt": "\xff"}', b'{"prompt": ' + b"[" * 100_000):
            check_error(client.post(PATH, content=body), None)
        check_error(client.post(PATH, content=b'{"prompt": "x", "top_p": NaN}'), "top_p", "nan")
        error_of(client.get(PATH), 405)


def test_body_limit(server: Server, tmp_path: Path) -> None:
    limit = 64 << 20
    with server.client(headers={"Content-Type": "application/json"}) as client:
        declared = client.post(PATH, content=b" " * (limit + 1))
        check_error(declared, None, limit, status=413)
        parts = (b" " * (1 << 20) for _ in range(65))
        check_error(client.post(PATH, content=parts), None, limit, status=413)
        assert client.post(PATH, json={"prompt": "x", "max_tokens": 1}).status_code == 200
