"""Greedy float32 answers over the wire equal those of Hugging Face transformers, token for token."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from PIL import Image
from transformers import AutoTokenizer

from tests.conftest import MakeCheckpoint
from tests.oracle import hf_generate, hf_prompt_ids
from tests.random_checkpoint import CheckpointSpec
from tests.server.launch import Launch, Server, assistant, data_url, image_part, text_part, user

MAX_TOKENS = 24


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@dataclass(frozen=True)
class Case:
    """A conversation; an image is the index of a photo and the way in which the server gets it."""

    name: str
    messages: tuple[tuple[str, tuple[Any, ...]], ...]

    @property
    def images(self) -> list[int]:
        return [int(part[0]) for _, parts in self.messages for part in parts if isinstance(part, tuple)]


CHINA, FLOWER = (0, "data"), (1, "data")
CASES = [
    Case("text", (("user", ("What is the capital of France?",)),)),
    Case("system", (("system", ("You are brief.",)), ("user", ("Hello!",)))),
    Case("long-text", (("user", ("Tell me about trees and clouds. " * 30,)),)),
    Case("unicode", (("user", ("Grüße an 東京 🌸!",)),)),
    Case("one-data", (("user", ("What is this?", CHINA)),)),
    Case("one-http", (("user", ("What is this?", (1, "http"))),)),
    Case("one-file", (("user", ("What is this?", (0, "file"))),)),
    Case("image-only", (("user", (FLOWER,)),)),
    Case("two", (("user", (CHINA, FLOWER, "Compare them.")),)),
    Case("two-swapped", (("user", ((1, "http"), (0, "file"), "Compare them.")),)),
    Case("four", (("user", (CHINA, (1, "file"), CHINA, (0, "http"), "Which differs?")),)),
    Case(
        "multi-turn",
        (("user", ("Who are you?",)), ("assistant", ("I am an assistant.",)), ("user", ("Since when?",))),
    ),
    Case(
        "images-over-messages",
        (
            ("user", ("Look at this.", CHINA)),
            ("assistant", ("A temple.",)),
            ("user", ((1, "file"), "And this?", (0, "http"))),
            ("assistant", ("A flower, a temple.",)),
            ("user", ("Is it day?",)),
        ),
    ),
]


@dataclass
class Oracle:
    """What transformers says, and the requests that ask the server for the same."""

    folder: Path
    photos: list[Image.Image]
    urls: dict[tuple[int, str], str]

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self._known: dict[str, tuple[list[int], list[int]]] = {}

    def messages(self, case: Case) -> list[dict[str, Any]]:
        made = []
        for role, parts in case.messages:
            if all(isinstance(part, str) for part in parts):
                made.append({"role": role, "content": "".join(parts)})
            else:
                content = [text_part(p) if isinstance(p, str) else image_part(self.urls[p]) for p in parts]
                made.append({"role": role, "content": content})
        return made

    def answer(self, case: Case) -> tuple[list[int], list[int]]:
        """The prompt's ids and those of the answer."""
        if case.name not in self._known:
            prompt = hf_prompt_ids(self.folder, self.messages(case))
            images = [self.photos[index] for index in case.images]
            self._known[case.name] = prompt, hf_generate(self.folder, prompt, images, MAX_TOKENS)
        return self._known[case.name]

    def text(self, prompt: list[int], answer: list[int]) -> str:
        before, whole = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + answer))
        assert whole.startswith(before)
        return str(whole[len(before) :])


@dataclass
class Reply:
    """What the server says, streamed or not."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    usage: Any


@pytest.fixture(scope="module")
def web(photo_files: list[Path]) -> Iterator[str]:
    """The address of a web server of the photographs."""
    handler = partial(_Quiet, directory=str(photo_files[0].parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(launch: Launch, checkpoint: MakeCheckpoint, photo_files: list[Path]) -> Server:
    folder = str(photo_files[0].parent)
    return launch(
        checkpoint(), "--allow-private-media-hosts", "--allowed-local-media-path", folder,
        "--max-num-batched-tokens", "128", "--max-num-seqs", "8",
    )  # fmt: skip


@pytest.fixture(scope="module")
def oracle(checkpoint: MakeCheckpoint, photos: list[Image.Image], photo_files: list[Path], web: str) -> Oracle:
    urls = {}
    for index, file in enumerate(photo_files):
        urls |= {(index, "data"): data_url(file), (index, "file"): file.as_uri()}
        urls[(index, "http")] = f"{web}/{file.name}"
    return Oracle(checkpoint(), photos, urls)


async def ask(client: AsyncOpenAI, model: str, messages: list[Any], *, stream: bool) -> Reply:
    options: dict[str, Any] = {
        "model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS,
        "extra_body": {"return_token_ids": True},
    }  # fmt: skip
    if not stream:
        whole = await client.chat.completions.create(**options)
        choice = whole.choices[0].model_dump()
        ids: list[int] = whole.model_dump()["prompt_token_ids"]
        return Reply(ids, choice["token_ids"], choice["message"]["content"], whole.usage)
    reply = Reply([], [], "", None)
    async for chunk in await client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        reply.usage = chunk.usage
        reply.prompt_ids += chunk.model_dump().get("prompt_token_ids") or []
        for part in chunk.choices:
            reply.text += part.delta.content or ""
            reply.token_ids += part.model_dump().get("token_ids") or []
    return reply


def check(oracle: Oracle, case: Case, reply: Reply) -> None:
    prompt, answer = oracle.answer(case)
    assert reply.prompt_ids == prompt, case.name
    assert reply.token_ids == answer, case.name
    assert reply.text == oracle.text(prompt, answer), case.name
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == len(answer)
    assert reply.usage.total_tokens == len(prompt) + len(answer)
    assert reply.usage.prompt_tokens_details.model_dump()["image_tokens"] == 16 * len(case.images)


def client_of(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_alone(server: Server, oracle: Oracle, case: Case) -> None:
    async with client_of(server) as client:
        reply = await ask(client, server.names[0], oracle.messages(case), stream=False)
        check(oracle, case, reply)
        again = await ask(client, server.names[0], oracle.messages(case), stream=True)
        check(oracle, case, again)
    if len(reply.prompt_ids) > 16:
        assert again.usage.prompt_tokens_details.cached_tokens > 0
        assert again.usage.prompt_tokens_details.cached_tokens < len(reply.prompt_ids)


async def test_many_at_once(server: Server, oracle: Oracle) -> None:
    cases = [CASES[number % len(CASES)] for number in range(24)]
    async with client_of(server) as client:
        asked = [
            ask(client, server.names[0], oracle.messages(case), stream=number % 3 == 0)
            for number, case in enumerate(cases)
        ]
        replies = await asyncio.gather(*asked)
    for case, reply in zip(cases, replies, strict=True):
        check(oracle, case, reply)


async def test_images_matter_in_content_and_order(oracle: Oracle) -> None:
    """Otherwise the tests above would show nothing."""
    question = "What is this?"
    china, flower = (Case(f"m{i}", (("user", (question, (i, "data"))),)) for i in (0, 1))
    ahead = Case("ahead", (("user", (CHINA, FLOWER, question)),))
    behind = Case("behind", (("user", (FLOWER, CHINA, question)),))
    assert oracle.answer(china)[1] != oracle.answer(flower)[1]
    assert oracle.answer(ahead)[1] != oracle.answer(behind)[1]


async def test_preemption(launch: Launch, checkpoint: MakeCheckpoint, oracle: Oracle) -> None:
    """A cache that is far too small for all of them at once, without prefix caching."""
    server = launch(
        checkpoint(), "--num-gpu-blocks-override", "24", "--no-enable-prefix-caching", "--block_size", "16",
        "--allow-private-media-hosts", "--max-num-batched-tokens", "64",
    )  # fmt: skip
    cases = [case for case in CASES if case.name in ("text", "one-data", "one-http", "two", "image-only", "unicode")]
    async with client_of(server) as client:
        asked = [ask(client, server.names[0], oracle.messages(case), stream=False) for case in cases * 3]
        replies = await asyncio.gather(*asked)
    for case, reply in zip(cases * 3, replies, strict=True):
        check(oracle, case, reply)
        assert reply.usage.prompt_tokens_details.cached_tokens == 0
    assert server.metric("vllm:num_preemptions_total") > 0


async def test_text_only_model(launch: Launch, checkpoint: MakeCheckpoint, photo_files: list[Path]) -> None:
    folder = checkpoint(CheckpointSpec(kind="llama"))
    server = launch(folder)
    oracle = Oracle(folder, [], {})
    messages = [user("Hello!"), assistant("Hi."), user("How many people are there?")]
    prompt = hf_prompt_ids(folder, messages)
    expected = hf_generate(folder, prompt, (), MAX_TOKENS)
    async with client_of(server) as client:
        reply = await ask(client, server.names[0], messages, stream=False)
    assert (reply.prompt_ids, reply.token_ids) == (prompt, expected)
    assert reply.text == oracle.text(prompt, expected)
    refused = server.post(
        "/v1/chat/completions", {"messages": [user(text_part("Look."), image_part(data_url(photo_files[0])))]}
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "this is a text-only model: it takes no images"
