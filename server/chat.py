"""`POST /v1/chat/completions`."""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import Any
from uuid import uuid4

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
    shown_logprob,
)
from server.openapi import describe_post
from server.prompts import chat_prompt
from server.protocol import ChatCompletionRequest
from server.response_types import ChatCompletion, ChatCompletionChunk
from server.sse import EventStream, json_response, unless_client_goes
from server.state import ServerState, let_go, read_body, state_of
from server.tools import ToolReader, ToolUse, joined

router = APIRouter()

_KEPT = ("n", "stream", "stream_options", "logprobs", "prompt_logprobs", "return_token_ids")
"""What an answer is made by."""


@router.post(
    "/v1/chat/completions",
    openapi_extra=describe_post(ChatCompletionRequest, answer=ChatCompletion, event=ChatCompletionChunk),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, in one piece or as a stream."""
    arrived = time.monotonic()
    state = state_of(request)
    body = await read_body(request, ChatCompletionRequest)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(state.open_request(request))
        chat = await unless_client_goes(request, start_chat(state, body, arrived))
        stack.callback(chat.abort)
        let_go(request, body, *_KEPT)
        if not body.stream:
            return json_response(await unless_client_goes(request, chat.whole()))
        return EventStream(chat.events(), stack.pop_all())


async def start_chat(state: ServerState, body: ChatCompletionRequest, arrived: float) -> "Chat":
    """Check the request, make its prompt and hand it to the engine."""
    model = state.check_model(body.model)
    body.check_served()
    use = body.tool_use(state.args.tool_call_parser)
    with _max_tokens_as_given(body):
        params = body.params(state.config.sampling_defaults, use)
    # Before a place is claimed: checking may take long, and holds up nobody else.
    grammar = await state.grammar(params, body.form_field if use is None or use.form is None else "tools")
    with state.engine.admission(params.n):
        prompt = await chat_prompt(state, body)
        with _max_tokens_as_given(body):
            limit = state.inputs.max_tokens(prompt, params.max_tokens)
        check_logprobs(params, [prompt], [limit])
        bad_words = await state.bad_words(params)
        name = f"chatcmpl-{uuid4().hex}"
        with _max_tokens_as_given(body):
            stream = state.engine.generate(
                prompt,
                params,
                max_tokens=limit,
                bad_words=bad_words,
                grammar=grammar,
                arrival_time=arrived,
                priority=body.priority or 0,
                cache_salt=body.cache_salt or "",
                request_id=name,
            )
    body.keep_only(*_KEPT)  # beside answers that run or wait, messages and images would take much memory
    chat = Chat(state, body, prompt, stream, params, name, model, use)
    accepted(state, chat.usage, params, name=name, model=model)
    return chat


@contextmanager
def _max_tokens_as_given(body: ChatCompletionRequest) -> Iterator[None]:
    """Errors name `max_completion_tokens` if that is what the client gave."""
    try:
        yield
    except ValueError as error:
        if body.max_completion_tokens is None:
            raise
        raise ValueError(str(error).replace("max_tokens", "max_completion_tokens")) from error


class Chat:
    """One conversation's answers on their way to the client."""

    def __init__(
        self,
        state: ServerState,
        body: ChatCompletionRequest,
        prompt: ProcessedPrompt,
        stream: ResponseStream,
        params: SamplingParams,
        name: str,
        model: str,
        use: ToolUse | None,
    ) -> None:
        self._state = state
        self._body = body
        self._use = use
        self._prompt = prompt
        self._stream = stream
        self.usage = Usage.of([prompt])
        self.model = model
        self.params = params
        self._head = {"id": name, "created": int(time.time()), "model": model, "system_fingerprint": state.fingerprint}

    def abort(self) -> None:
        """Stop what still runs."""
        abort(self._state, [self._stream])

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What comes new of any answer, counted in `usage`."""
        async with aclosing(run(self._state, [self._stream])) as deltas:
            async for _, delta in deltas:
                self.usage.add(0, delta)
                yield delta

    async def whole(self) -> dict[str, Any]:
        """The response in one piece."""
        answers = [Answer(lambda entry: encoded(logprob_json(entry))) for _ in range(self._body.n or 1)]
        prompt_logprobs: list[TokenLogprobs | None] | None = None
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                answers[delta.index].add(delta)
                prompt_logprobs = prompt_logprobs or delta.prompt_logprobs
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        response = {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage.json()}
        if self._body.prompt_logprobs is not None:
            response["prompt_logprobs"] = await prompt_logprobs_json(prompt_logprobs)
        if self._body.return_token_ids:
            response["prompt_token_ids"] = self._prompt.token_ids
        return response

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream."""
        begun: set[int] = set()
        readers = {} if self._use is None else {i: ToolReader(self._use) for i in range(self._body.n or 1)}
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                if delta.index not in begun:
                    first = not begun
                    begun.add(delta.index)
                    yield self._chunk(delta.index, {"role": self._state.args.response_role, "content": ""}, first=first)
                if delta.text or delta.logprobs or delta.finish_reason or self._body.return_token_ids:
                    for chunk in self._delta_chunks(delta, readers.get(delta.index)):
                        yield chunk
        if self._body.include_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage.json()}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        said: dict[str, Any] = {"content": "".join(answer.text)}
        finish_reason = answer.finish_reason
        if self._use is not None:
            reader = ToolReader(self._use)
            said = joined(reader.feed(said["content"], is_last=True))
            finish_reason = reader.finish_reason(finish_reason)
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": self._state.args.response_role, **said, "refusal": None},
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def _delta_chunks(self, delta: Delta, reader: ToolReader | None) -> Iterator[dict[str, Any]]:
        """One chunk, or with calls of tools one for each piece; what else there is to tell is in the last."""
        is_last = delta.finish_reason is not None
        said: list[dict[str, Any]] = [{"content": delta.text} if delta.text or not is_last else {}]
        if reader is not None:
            said = reader.feed(delta.text, is_last=is_last) or [{}]
            if said == [{}] and not (is_last or delta.logprobs or self._body.return_token_ids):
                return
        for piece in said[:-1]:
            yield self._chunk(delta.index, piece)
        chunk = self._chunk(delta.index, said[-1])
        choice = chunk["choices"][0]
        if delta.logprobs:
            choice["logprobs"] = self._logprobs([logprob_json(entry) for entry in delta.logprobs])
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        if is_last:
            reason = delta.finish_reason
            choice["finish_reason"] = reason if reader is None else reader.finish_reason(reason)
            choice["stop_reason"] = delta.stop_reason
        yield chunk

    def _chunk(self, index: int, delta: dict[str, Any], *, first: bool = False) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if self._body.include_usage:
            chunk["usage"] = self.usage.json() if self._body.continuous_usage else None
        if first and self._body.return_token_ids:
            chunk["prompt_token_ids"] = self._prompt.token_ids
        return chunk

    def _logprobs(self, shown: list[Any]) -> dict[str, Any] | None:
        return {"content": shown, "refusal": None} if self._body.logprobs else None


def logprob_json(entry: TokenLogprobs) -> dict[str, Any]:
    """OpenAI's object for one token."""
    top = [_token(text, raw, logprob) for _, text, raw, logprob in entry.top]
    return {**_token(entry.text, entry.raw, entry.logprob), "top_logprobs": top}


def _token(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": shown_logprob(logprob), "bytes": list(raw)}
