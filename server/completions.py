"""`POST /v1/completions`."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from itertools import accumulate
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.client import ResponseStream
from engine.input_processor import ProcessedPrompt
from engine.outputs import Delta, TokenLogprobs
from engine.sampling_params import SamplingParams
from server.generation import (
    Answer,
    Usage,
    abort,
    accepted,
    check_logprobs,
    encoded,
    prompt_logprobs_json,
    run,
    shown_in_turns,
    shown_logprob,
)
from server.openapi import describe_post
from server.prompts import text_prompt
from server.protocol import CompletionRequest
from server.response_types import Completion, CompletionChunk
from server.sse import EventStream, json_response, unless_client_goes
from server.state import ServerState, let_go, read_body, state_of

router = APIRouter()

_KEPT = (
    "n", "stream", "stream_options", "logprobs", "prompt_logprobs", "return_token_ids", "echo", "max_tokens",
)  # fmt: skip
"""What answers are made by."""


@router.post(
    "/v1/completions", openapi_extra=describe_post(CompletionRequest, answer=Completion, event=CompletionChunk)
)
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts, in one piece or as a stream."""
    arrived = time.monotonic()
    state = state_of(request)
    body = await read_body(request, CompletionRequest)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(state.open_request(request))
        completion = await unless_client_goes(request, _start(state, body, arrived))
        stack.callback(completion.abort)
        let_go(request, body, *_KEPT)
        if not body.stream:
            return json_response(await unless_client_goes(request, completion.whole()))
        return EventStream(completion.events(), stack.pop_all())


async def _start(state: ServerState, body: CompletionRequest, arrived: float) -> "_Completion":
    """Check the request, make its prompts and hand them to the engine."""
    model = state.check_model(body.model)
    body.check_served()
    given = body.prompts()
    params = body.params(state.config.sampling_defaults)
    grammar = await state.grammar(params, body.form_field)
    with state.engine.admission(params.n * len(given)):
        prompts = await asyncio.gather(*(_prompt(state, body, prompt) for prompt in given))
        limits = [_limit(state, body, params, prompt) for prompt in prompts]
        params.check_vocab(state.config.vocab_size)
        check_logprobs(params, prompts, limits)
        bad_words = await state.bad_words(params)
        name = f"cmpl-{uuid4().hex}"
        streams: list[ResponseStream] = []
        try:
            for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
                stream = state.engine.generate(
                    prompt,
                    params,
                    max_tokens=limit,
                    bad_words=bad_words,
                    grammar=grammar,
                    arrival_time=arrived,
                    priority=body.priority or 0,
                    cache_salt=body.cache_salt or "",
                    request_id=f"{name}-{number}",
                )
                streams.append(stream)
        except BaseException:
            for stream in streams:  # of the prompts before the one that was refused
                stream.abort()
            raise
    completion = _Completion(state, body, prompts, streams, name, model, params.n)
    accepted(state, completion.usage, params, name=name, model=model)
    return completion


def _limit(state: ServerState, body: CompletionRequest, params: SamplingParams, prompt: ProcessedPrompt) -> int:
    """How long the answer may be; what the client did not ask for is cut to the context."""
    if body.max_tokens is None and params.max_tokens is not None:
        return min(params.max_tokens, state.inputs.max_tokens(prompt, None))
    return state.inputs.max_tokens(prompt, params.max_tokens)


async def _prompt(state: ServerState, body: CompletionRequest, prompt: str | list[int]) -> ProcessedPrompt:
    return await text_prompt(
        state,
        prompt,
        add_special_tokens=body.add_special_tokens is not False,
        truncate=body.truncate_prompt_tokens,
        want_text=bool(body.echo),
    )


class _Completion:
    """The answers to one request's prompts on their way to the client."""

    def __init__(
        self,
        state: ServerState,
        body: CompletionRequest,
        prompts: list[ProcessedPrompt],
        streams: list[ResponseStream],
        name: str,
        model: str,
        n: int,
    ) -> None:
        self._state = state
        self._body = body
        self._prompts = prompts
        self._streams = streams
        self._n = n
        self.usage = Usage.of(prompts)
        self._head = {"id": name, "object": "text_completion", "created": int(time.time()), "model": model,
                      "system_fingerprint": state.fingerprint}  # fmt: skip

    def abort(self) -> None:
        """Stop what still runs."""
        abort(self._state, self._streams)

    def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        return run(self._state, self._streams, generates=self._body.max_tokens != 0)

    async def whole(self) -> dict[str, Any]:
        """The response in one piece."""
        answers = [Answer(_entry) for _ in range(self._n * len(self._prompts))]
        prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        async with aclosing(self._deltas()) as deltas:
            async for number, delta in deltas:
                answers[number * self._n + delta.index].add(delta)
                self.usage.add(number, delta)
                if delta.prompt_logprobs is not None:
                    prompt_logprobs[number] = delta.prompt_logprobs
        choices = [
            await self._choice(index, answer, prompt_logprobs.get(index // self._n))
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "choices": choices, "usage": self.usage.json()}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream."""
        begun: set[int] = set()
        offsets = [0] * (self._n * len(self._prompts))
        async with aclosing(self._deltas()) as deltas:
            async for number, delta in deltas:
                self.usage.add(number, delta)
                index = number * self._n + delta.index
                if index not in begun and self._body.echo:
                    yield self._chunk(index, self._prompts[number].text or "", None)
                first = index not in begun
                begun.add(index)
                if delta.text or delta.logprobs or delta.finish_reason or self._body.return_token_ids:
                    yield self._delta_chunk(index, delta, offsets, first=first)
        if self._body.include_usage:
            yield {**self._head, "choices": [], "usage": self.usage.json()}

    async def _choice(
        self, index: int, answer: Answer, prompt_logprobs: list[TokenLogprobs | None] | None
    ) -> dict[str, Any]:
        prompt = self._prompts[index // self._n]
        text = "".join(answer.text)
        entries: list[_Entry] = answer.logprobs
        offset = 0
        if self._body.echo:
            text = (prompt.text or "") + text
            offset = len(prompt.text or "")
            if self._body.logprobs is not None and prompt_logprobs is not None:
                entries, offset = [*await self._echoed(prompt, prompt_logprobs), *entries], 0
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None if self._body.logprobs is None else _logprobs(entries, offset),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = await prompt_logprobs_json(prompt_logprobs)
        if self._body.return_token_ids:
            choice |= {"token_ids": answer.token_ids, "prompt_token_ids": prompt.token_ids}
        return choice

    async def _echoed(self, prompt: ProcessedPrompt, entries: list[TokenLogprobs | None]) -> list["_Entry"]:
        """An echo names the first prompt token too, which has no log probability."""
        text = self._state.inputs.decode(prompt.token_ids[:1], skip_special_tokens=True)
        rest = [entry for entry in entries if entry is not None]
        return [_Entry(text, None, encoded(None)), *await shown_in_turns(_entry, rest)]

    def _delta_chunk(self, index: int, delta: Delta, offsets: list[int], *, first: bool) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None and delta.logprobs:
            logprobs = _logprobs([_entry(entry) for entry in delta.logprobs], offsets[index])
            # Not the delta's text: a token's log probability comes when all of its text is out.
            offsets[index] += sum(len(entry.text) for entry in delta.logprobs)
        chunk = self._chunk(index, delta.text, logprobs)
        choice = chunk["choices"][0]
        choice["finish_reason"] = delta.finish_reason
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = self._prompts[index // self._n].token_ids
        return chunk

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._body.include_usage:
            chunk["usage"] = self.usage.json() if self._body.continuous_usage else None
        return chunk


class _Entry(NamedTuple):
    """One token of the older form."""

    text: str
    logprob: float | None
    top: msgspec.Raw


def _entry(entry: TokenLogprobs) -> _Entry:
    logprob = shown_logprob(entry.logprob)
    top = {text: shown_logprob(rival) for _, text, _, rival in reversed(entry.top)}
    return _Entry(entry.text, logprob, encoded(top | {entry.text: logprob}))


def _logprobs(entries: list[_Entry], offset: int) -> dict[str, Any]:
    """OpenAI's older form: four lists of equal length."""
    ends = accumulate((len(entry.text) for entry in entries), initial=offset)
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [entry.top for entry in entries],
        "text_offset": list(ends)[:-1],
    }
