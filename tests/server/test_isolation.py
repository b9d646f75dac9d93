"""Requests of all kinds at once are answered as each of them is alone."""

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import MakeCheckpoint
from tests.image_files import all_files, encoded
from tests.server.launch import Launch, Server, data_url, image_part, text_part, user
from tests.server.test_stream_property import assert_close

Fields = dict[str, Any]
CHAT = "/v1/chat/completions"
WORDS = ["tree", "cloud", "é東", "What is this?", "Once upon a time there was", "number 7 ", "the red house "]
IMAGES = ("TIFF upright 5", "PNG transparent colour", "WEBP lossy", "GIF frames 2")
# Not shrunk: a failing mix would be asked for hundreds of times.
MIXES = settings(max_examples=5, derandomize=True, deadline=None, phases=(Phase.generate,))


def _optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


SAMPLING = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 0, 0.8, 3]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "max_tokens": st.integers(1, 24),
        "n": st.sampled_from([None, None, 2]),
        "top_p": _optional(st.sampled_from([0.3, 0.9])),
        "top_k": _optional(st.sampled_from([1, 5, 50])),
        "min_p": _optional(st.just(0.05)),
        "repetition_penalty": _optional(st.sampled_from([0.8, 1.5])),
        "presence_penalty": _optional(st.sampled_from([-1, 2])),
        "frequency_penalty": _optional(st.sampled_from([-0.5, 1])),
        "logit_bias": _optional(st.dictionaries(st.integers(300, 690).map(str), st.sampled_from([-100, 3, 8]))),
        "bad_words": _optional(st.lists(st.sampled_from(["a", "he", "house", " "]), max_size=3)),
        "allowed_token_ids": _optional(st.just([*range(300, 400)])),
        "min_tokens": _optional(st.just(1)),
        "stop": _optional(st.lists(st.sampled_from(["e", "an", "ing"]), min_size=1, max_size=2)),
        "stop_token_ids": _optional(st.lists(st.integers(300, 690), max_size=20)),
        "ignore_eos": _optional(st.booleans()),
        "top_logprobs": _optional(st.integers(0, 3)),
        "prompt_logprobs": st.sampled_from([None, None, None, 1]),
        "cache_salt": _optional(st.sampled_from(["mine", "yours"])),
        "priority": st.integers(-2, 2),
    }
)  # fmt: skip
REQUESTS = st.tuples(
    SAMPLING,
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4),
    st.lists(st.integers(0, len(IMAGES) + 1), max_size=2),
    st.integers(1, 20),
)


@pytest.fixture(scope="module")
def server(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    """Has too little room for a whole mix, so that prompts are cut, requests preempted and slots given on."""
    limits = ("--num-gpu-blocks-override", "40", "--max-num-batched-tokens", "48", "--max-num-seqs", "5")
    return launch(checkpoint(), *limits, "--disable-log-requests")


@pytest.fixture(scope="module")
def urls(photo_files: list[Path]) -> list[str]:
    files = all_files()
    made = [f"data:image/png;base64,{base64.b64encode(files[name]).decode()}" for name in IMAGES]
    return [*made, *map(data_url, photo_files)]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def body_of(request: tuple[Fields, list[str], list[int], int], urls: list[str]) -> Fields:
    fields, words, images, repeats = request
    content = [*(image_part(urls[image]) for image in images), text_part("".join(words) * repeats)]
    asked = fields["top_logprobs"] is not None
    return {**fields, "logprobs": asked, "messages": [user(*content)], "return_token_ids": True}


async def ask(client: httpx.AsyncClient, body: Fields) -> Fields:
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    reply: Fields = response.json()
    return {key: reply.get(key) for key in ("choices", "prompt_token_ids", "prompt_logprobs")}


async def leave(client: httpx.AsyncClient, body: Fields) -> None:
    """Ask, and hang up before the answer."""
    with pytest.raises(httpx.TimeoutException):
        await client.post(CHAT, json={**body, "max_tokens": 200, "ignore_eos": True, "stop": None}, timeout=0.05)


@MIXES
@given(requests=st.lists(REQUESTS, min_size=6, max_size=10), data=st.data())
def test_answers_of_a_mix(
    server: Server, urls: list[str], runner: asyncio.Runner, requests: list[Any], data: st.DataObject
) -> None:
    bodies = [body_of(request, urls) for request in requests]
    order = data.draw(st.permutations([*range(len(bodies)), *range(len(bodies))]))
    left = data.draw(st.sampled_from(bodies))

    async def compare() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
            alone = [await ask(client, body) for body in bodies]
            gone = asyncio.create_task(leave(client, left))
            mixed = await asyncio.gather(*(ask(client, bodies[place]) for place in order))
            await asyncio.gather(gone, return_exceptions=True)
            for place, found in zip(order, mixed, strict=True):
                assert_close(found, alone[place])
            again = [await ask(client, body) for body in bodies[:2]]
            assert_close(again, alone[:2])

    runner.run(compare())


def test_there_was_a_crowd(server: Server) -> None:
    """Else the test above would show little."""
    assert server.metric("vllm:num_preemptions_total") > 0
    assert server.metric("vllm:prefix_cache_hits_total") > 0
    assert server.metric("vllm:request_success_total", finished_reason="abort") > 0
    server.wait_for_metric("vllm:num_requests_running", lambda value: value == 0)


SALTS = [None, "a", "b", "ab", "a\0", "\0a", "A", " a", "null", "None", "a" * 256, "a" * 255, "é", "e\u0301"]


def picture_work(server: Server) -> list[float]:
    """Pictures decoded, and encoded, so far."""
    return [server.metric(name) for name in ("vllm:image_decode_seconds_count", "vllm:image_encoder_images_total")]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_nobody_finds_what_another_salt_cached(server: Server, path: str) -> None:
    """Each salt finds its own prompt the second time only, pictures among it."""
    own = encoded(Image.new("RGB", (8, 8), (len(path), 5, 5)), "PNG")  # in no mix above
    url = f"data:image/png;base64,{base64.b64encode(own).decode()}"
    text = f"A prompt of {path} that is longer than two blocks, which are what the cache is made of. "
    inputs: Fields = {
        CHAT: {"messages": [user(image_part(url), text_part(text))], "max_tokens": 1},
        "/v1/completions": {"prompt": text, "max_tokens": 1},
        "/v1/responses": {"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": url}, {"type": "input_text", "text": text}]}],
            "max_output_tokens": 1, "instructions": "Look."},
    }[path]  # fmt: skip
    for salt in SALTS:
        found, work = [], []
        for _ in range(2):
            before = picture_work(server)
            usage = server.post(path, {**inputs, "cache_salt": salt}).json()["usage"]
            found.append((usage.get("prompt_tokens_details") or usage["input_tokens_details"])["cached_tokens"])
            work.append([after - earlier for earlier, after in zip(before, picture_work(server), strict=True)])
        assert found[0] == 0 < found[1], salt
        assert work == [[0, 0] if path == "/v1/completions" else [1, 1], [0, 0]], salt
