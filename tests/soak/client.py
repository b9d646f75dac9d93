"""One client: asks, streams, leaves, dawdles and errs, as its seed says."""

import asyncio
import contextlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from tests.soak.cases import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Case
from tests.soak.mistakes import JSON, MISTAKES, Mistake
from tests.soak.pictures import data_url, noise

_TIMEOUT = aiohttp.ClientTimeout(total=300)


@dataclass(slots=True)
class Tally:
    """What came of it."""

    done: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


class Client:
    """Does one thing after the other."""

    def __init__(self, base_url: str, cases: list[Case], seed: int, tally: Tally) -> None:
        self._base_url = base_url
        self._cases = cases
        self._plain = [case for case in cases if case.is_plain]
        self._chance = random.Random(seed)
        self._tally = tally

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(force_close=self._chance.random() < 0.3)
        self._session = aiohttp.ClientSession(self._base_url, connector=connector, timeout=_TIMEOUT)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def run(self, stop: asyncio.Event) -> None:
        """Go on until told to stop; what is begun is ended."""
        acts = [
            (30, self._ask), (12, self._ask_otherwise), (8, self._sample), (8, self._leave), (3, self._leave_a_body),
            (5, self._dawdle), (14, self._err), (5, self._tokenize), (5, self._several), (5, self._stop_string),
        ]  # fmt: skip
        async with self:
            while not stop.is_set():
                (act,) = self._chance.choices([act for _, act in acts], [weight for weight, _ in acts])
                try:
                    await act()
                except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
                    self._tally.unexpected.append(f"{act.__name__}: {error!r}")
                self._tally.done[act.__name__.strip("_")] += 1

    async def answer(self, case: Case) -> str:
        """A case's answer, in one piece."""
        return _text(CHAT, await self._post(CHAT, case.body(CHAT, self._chance)))

    async def show(self) -> None:
        """A picture that never came before."""
        parts = [{"type": "image_url", "image_url": {"url": data_url(noise(self._chance))}}]
        await self._post(CHAT, {"messages": [{"role": "user", "content": parts}], "max_tokens": 1})

    async def _ask(self) -> None:
        case = self._chance.choice(self._cases)
        body = case.body(CHAT, self._chance) | self._chance.choice(
            [{}, {}, {"logprobs": True, "top_logprobs": 3}, {"seed": 4}, {"prompt_logprobs": 1}]
        )
        if self._chance.random() < 0.5 and "prompt_logprobs" not in body:
            self._compare(case.answer, await self._stream(CHAT, body), "a stream")
            return
        found = await self._post(CHAT, body)
        self._compare(case.answer, _text(CHAT, found), "a chat")
        if body.get("logprobs"):
            tokens = found["choices"][0]["logprobs"]["content"]
            self._compare(case.answer, "".join(token["token"] for token in tokens), "log probabilities")

    async def _ask_otherwise(self) -> None:
        case, path = self._chance.choice(self._plain), self._chance.choice([RESPONSES, MESSAGES])
        body = case.body(path, self._chance)
        if path == RESPONSES:
            body["store"] = self._chance.random() < 0.2
        if self._chance.random() < 0.5:
            text = await self._stream(path, body)
        else:
            text = _text(path, await self._post(path, body))
        self._compare(case.answer, text, path)

    async def _several(self) -> None:
        case, count = self._chance.choice(self._cases), self._chance.randint(2, 4)
        found = await self._post(CHAT, case.body(CHAT, self._chance) | {"n": count})
        for choice in found["choices"]:
            self._compare(case.answer, choice["message"]["content"], "one of several")

    async def _stop_string(self) -> None:
        case = self._chance.choice([case for case in self._plain if len(case.answer) > 8])
        start = self._chance.randrange(1, len(case.answer) - 3)
        stop = case.answer[start : start + 3]
        body = case.body(CHAT, self._chance) | {"stop": [stop, "never said"]}
        text = await self._stream(CHAT, body) if start % 2 else _text(CHAT, await self._post(CHAT, body))
        self._compare(case.answer.partition(stop)[0], text, "a stop string")

    async def _dawdle(self) -> None:
        case = self._chance.choice(self._cases)
        text = await self._stream(CHAT, case.body(CHAT, self._chance), pause=self._chance.uniform(0.01, 0.2))
        self._compare(case.answer, text, "a slow reader")

    async def _sample(self) -> None:
        """Whatever comes of it, in the right form."""
        random_ = self._chance
        body: dict[str, Any] = {
            "temperature": random_.uniform(0, 2), "top_p": random_.uniform(0.1, 1), "min_p": random_.choice([0, 0.1]),
            "top_k": random_.choice([-1, 1, 50]), "max_tokens": random_.randint(1, 20), "n": random_.randint(1, 3),
            "presence_penalty": random_.uniform(-2, 2), "frequency_penalty": random_.uniform(-2, 2),
            "repetition_penalty": random_.uniform(0.5, 2), "priority": random_.randint(-3, 3),
            "ignore_eos": random_.random() < 0.3, "cache_salt": random_.choice("ab"),
        }  # fmt: skip
        path = random_.choice([CHAT, COMPLETIONS])
        if path == CHAT:
            url = data_url(noise(random_))
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
            body["messages"] = [{"role": "user", "content": parts}]
        else:
            body |= {"prompt": ["Once", "USER: Hi ASSISTANT:"], "echo": random_.random() < 0.5}
        found = await self._post(path, body)
        wanted = body["n"] * (1 if path == CHAT else 2)
        if len(found["choices"]) != wanted or found["usage"]["completion_tokens"] > wanted * body["max_tokens"]:
            self._tally.unexpected.append(f"{wanted} answers were asked for: {found}")

    async def _leave(self) -> None:
        """Before the answer, or in the middle of it."""
        case = self._chance.choice(self._cases)
        long = {"max_tokens": 400, "ignore_eos": True, "min_tokens": 0, "stream": self._chance.random() < 0.6}
        body = case.body(CHAT, self._chance) | long | {"n": self._chance.randint(1, 2)}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._chance.expovariate(2)):
                async with self._session.post(CHAT, json=body) as response:
                    await self._expect(200, response)
                    if not body["stream"]:
                        await response.read()
                        return
                    async for _ in response.content:
                        if self._chance.random() < 0.05:
                            response.close()
                            return

    async def _leave_a_body(self) -> None:
        """Before all of the request is sent."""
        address = urlsplit(self._base_url)
        body = json.dumps(self._chance.choice(self._cases).body(CHAT, self._chance)).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        message = (head + body)[: self._chance.randrange(1, len(head + body))]
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(message)
        await asyncio.sleep(self._chance.uniform(0, 0.2))
        if self._chance.random() < 0.5:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _err(self) -> None:
        await self.err(self._chance.choice(MISTAKES))

    async def err(self, mistake: Mistake) -> None:
        """Make a mistake; what must come of it is part of it."""
        status, method, path, body, kind = mistake
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": kind}
        async with self._session.request(method, path, data=data, headers=headers) as response:
            if response.status != status or not await response.read():
                wrong = f"{method} {path} {str(body)[:80]}: {response.status} instead of {status}"
                self._tally.unexpected.append(wrong)

    async def _tokenize(self) -> None:
        text = " ".join(self._chance.choices(["Wörter", "shapes", "\U0001f600", "12", "the circle"], k=20))
        body = {"prompt": text, "add_special_tokens": False}
        tokens = (await self._post("/tokenize", body))["tokens"]
        self._compare(text, (await self._post("/detokenize", {"tokens": tokens}))["prompt"].strip(), "/tokenize")

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._session.post(path, json=body) as response:
            await self._expect(200, response)
            found: dict[str, Any] = await response.json()
            return found

    async def _stream(self, path: str, body: dict[str, Any], *, pause: float = 0) -> str:
        text = []
        async with self._session.post(path, json=body | {"stream": True}) as response:
            await self._expect(200, response)
            async for line in response.content:
                if line.startswith(b"data: {"):
                    text.append(_piece(path, json.loads(line[6:])))
                    await asyncio.sleep(pause)
        return "".join(text)

    async def _expect(self, status: int, response: aiohttp.ClientResponse) -> None:
        if response.status != status:
            raise ValueError(f"{response.url.path}: {response.status} {(await response.text())[:200]}")

    def _compare(self, wanted: str, found: str, what: str) -> None:
        self._tally.compared += 1
        if wanted != found:
            self._tally.wrong.append(f"{what}: {found!r} instead of {wanted!r}")


def _text(path: str, found: dict[str, Any]) -> str:
    if path == CHAT:
        return str(found["choices"][0]["message"]["content"])
    content = found["output"][0]["content"] if path == RESPONSES else found["content"]
    return "".join(part["text"] for part in content)


def _piece(path: str, event: dict[str, Any]) -> str:
    if "error" in event:
        raise ValueError(f"{path}: a stream ended with {event}")
    if path == CHAT:
        return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    if path == RESPONSES:
        return str(event["delta"]) if event["type"] == "response.output_text.delta" else ""
    return str(event["delta"]["text"]) if event["type"] == "content_block_delta" else ""
