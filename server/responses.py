"""`/v1/responses`: a chat in OpenAI's newer form, which can be asked for again and continued."""

import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from engine.outputs import Delta
from server.chat import Chat, logprob_json, start_chat
from server.conversation import Message
from server.errors import ApiError, bad_request, from_exception
from server.generation import Usage, encoded
from server.openapi import describe, describe_post
from server.prompts import check_system_text
from server.response_store import StoredResponse
from server.responses_answer import DeletedResponse, ResponseObject, ResponseStreamEvent
from server.responses_protocol import ResponsesRequest
from server.sse import NamedEventStream, unless_client_goes
from server.state import ServerState, check_size, let_go, read_body, state_of

router = APIRouter()

_MESSAGES = TypeAdapter(list[Message])
_FIELDS = {
    "messages": "input", "max_completion_tokens": "max_output_tokens", "response_format.json_schema": "text.format",
    "response_format": "text.format",
}  # fmt: skip
"""What a chat calls otherwise."""
_NOT_SERVED = ("include", "include_obfuscation", "starting_after", "stream")
"""What a response cannot be asked for again with."""
_PLACE = {"output_index": 0, "content_index": 0}
"""A response is one message of one part."""


@router.post(
    "/v1/responses",
    openapi_extra=describe_post(ResponsesRequest, answer=ResponseObject, event=ResponseStreamEvent, is_named=True),
)
async def create_response(request: Request) -> Response:
    """Answer a conversation, in one piece or as a stream."""
    arrived = time.monotonic()
    state = state_of(request)
    body = await read_body(request, ResponsesRequest)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(state.open_request(request))
        reply = await unless_client_goes(request, _start(state, body, _owner(request), arrived))
        stack.callback(reply.abort)
        let_go(request, body, "stream", "store", "previous_response_id")
        if not body.stream:
            return Response(await unless_client_goes(request, reply.whole()), media_type="application/json")
        return NamedEventStream(reply.events(), stack.pop_all())


@router.get("/v1/responses/{name}", openapi_extra=describe(ResponseObject, errors=(400, 401, 404)))
async def get_response(request: Request, name: str) -> Response:
    """A response that was kept, as it was answered."""
    for query, value in request.query_params.items():
        query = query.partition("[")[0]
        if query in _NOT_SERVED and value != "false":
            raise bad_request(f"{query} is not available here: a response is told as it was answered", query)
    with _missing(404, "response_id", name):
        stored = state_of(request).responses.get(_owner(request), name)
    return Response(stored.response, media_type="application/json")


@router.delete("/v1/responses/{name}", openapi_extra=describe(DeletedResponse, errors=(401, 404)))
async def delete_response(request: Request, name: str) -> dict[str, Any]:
    """Forget a response; those after it cannot be continued any more."""
    with _missing(404, "response_id", name):
        state_of(request).responses.delete(_owner(request), name)
    return {"id": name, "object": "response", "deleted": True}


async def _start(state: ServerState, body: ResponsesRequest, owner: bytes, arrived: float) -> "_Reply":
    """Check the request, put what came before in front of it, and start the chat that it means."""
    state.check_model(body.model)
    body.check_served()
    check_system_text(state, "instructions", body.instructions or "")
    messages, shown = await state.in_text_pool(_turns_of, body)
    async with AsyncExitStack() as stack:
        if body.previous_response_id is not None:
            if body.has_form:  # trying it may take long, and is remembered: not while others wait for the place
                with _in_our_words(body):
                    alone = await state.in_text_pool(body.chat, [], messages)
                    await state.grammar(alone.params(state.config.sampling_defaults), alone.form_field)
            await stack.enter_async_context(state.continuing.turn())
        before = await _before(state, body, owner, shown)
        with _in_our_words(body):
            chat_body = await state.in_text_pool(body.chat, before, messages)
            chat = await start_chat(state, chat_body, arrived)
    told = {**body.told_again(), "temperature": chat.params.temperature, "top_p": chat.params.top_p}
    return _Reply(state, body, chat, told, owner, shown)


async def _before(state: ServerState, body: ResponsesRequest, owner: bytes, shown: bytes) -> list[Message]:
    """The turns of the responses that this one continues; within the limits of one body they must be, with its own."""
    if body.previous_response_id is None:
        return []
    with _missing(400, "previous_response_id", body.previous_response_id, code="previous_response_not_found"):
        earlier = state.responses.conversation(owner, body.previous_response_id)
    texts = [text for response in earlier for text in (response.input, response.output)]
    await state.in_text_pool(check_size, state, "the conversation", *texts, shown)
    return await state.in_text_pool(_turns, earlier)


def _turns_of(body: ResponsesRequest) -> tuple[list[Message], bytes]:
    """The input as turns of a chat, and as the JSON that is kept of them. For the text pool."""
    messages = body.messages()
    return messages, _MESSAGES.dump_json(messages)


def _turns(responses: list[StoredResponse]) -> list[Message]:
    turns: list[Message] = []
    for response in responses:
        turns += _MESSAGES.validate_json(response.input)
        turns.append(Message(role="assistant", content=response.output.decode()))
    return turns


class _Reply:
    """One response on its way to the client."""

    def __init__(
        self,
        state: ServerState,
        body: ResponsesRequest,
        chat: Chat,
        told: dict[str, Any],
        owner: bytes,
        shown: bytes,
    ) -> None:
        self._state = state
        self._body = body
        self._chat = chat
        self._owner = owner
        self._shown = shown
        """JSON of the messages that are answered."""
        self._id = f"resp_{uuid4().hex}"
        self._message_id = f"msg_{uuid4().hex}"
        self._head = {
            "id": self._id, "object": "response", "created_at": int(time.time()), "model": chat.model,
            "completed_at": None, "error": None, "incomplete_details": None, "output": [], "usage": None, **told,
        }  # fmt: skip
        self._num_events = 0

    def abort(self) -> None:
        """Stop what still runs."""
        self._chat.abort()

    async def whole(self) -> bytes:
        """The response in one piece, as JSON."""
        text = _Text()
        async with aclosing(self._chat.deltas()) as deltas:
            async for delta in deltas:
                text.add(delta)
        return self._finish(text, self._message(text.status, [text.part()]))

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream; the last one has the whole response, or tells why there is none."""
        for name in ("created", "in_progress"):
            yield self._event(name, response={**self._head, "status": "in_progress"})
        try:
            async with aclosing(self._answer_events()) as events:
                async for event in events:
                    yield event
        except Exception as error:
            told = {"code": "server_error", "message": from_exception(error).message}
            yield self._event("failed", response={**self._head, "status": "failed", "error": told})

    async def _answer_events(self) -> AsyncGenerator[dict[str, Any], None]:
        place = {"item_id": self._message_id, **_PLACE}
        text = _Text()
        yield self._event("output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("content_part.added", **place, part=text.part())
        async with aclosing(self._chat.deltas()) as deltas:
            async for delta in deltas:
                logprobs = text.add(delta)
                if delta.text or delta.logprobs:
                    yield self._event("output_text.delta", **place, delta=delta.text, logprobs=logprobs)
        part = text.part()
        message = self._message(text.status, [part])
        response = msgspec.Raw(self._finish(text, message))
        yield self._event("output_text.done", **place, text=text.text, logprobs=text.logprobs)
        yield self._event("content_part.done", **place, part=part)
        yield self._event("output_item.done", output_index=0, item=message)
        yield self._event(text.status, response=response)

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        number = self._num_events
        self._num_events += 1
        return {"type": f"response.{name}", "sequence_number": number, **fields}

    def _finish(self, text: "_Text", message: dict[str, Any]) -> bytes:
        """JSON of the response to an answer that is complete, kept if it is to be."""
        is_cut = text.status == "incomplete"
        response = {
            **self._head,
            "status": text.status,
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [message],
            "usage": _usage(self._chat.usage),
        }
        encoded = msgspec.json.encode(response)
        if self._body.is_stored:
            self._state.responses.add(
                StoredResponse(
                    id=self._id,
                    owner=self._owner,
                    previous=self._body.previous_response_id,
                    input=self._shown,
                    output=text.text.encode(),
                    response=encoded,
                )
            )
        return encoded

    def _message(self, status: str, content: list[msgspec.Raw]) -> dict[str, Any]:
        return {
            "id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content
        }  # fmt: skip


class _Text:
    """The only part of an answer as it grows. What was encoded once is not encoded again: with many rivals a token,
    an answer's log probabilities take megabytes, and its last events tell them four times.
    """

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._logprobs: list[bytes] = []
        self.status = "completed"

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._texts)

    @property
    def logprobs(self) -> msgspec.Raw:
        """JSON list of all log probabilities."""
        return _json_list(self._logprobs)

    def add(self, delta: Delta) -> msgspec.Raw:
        """Append what comes new; JSON list of its log probabilities."""
        new = [msgspec.json.encode(logprob_json(entry)) for entry in delta.logprobs]
        self._texts.append(delta.text)
        self._logprobs += new
        self.status = "incomplete" if delta.finish_reason == "length" else "completed"
        return _json_list(new)

    def part(self) -> msgspec.Raw:
        """JSON of the part."""
        part = {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}
        return encoded(part)


def _json_list(items: list[bytes]) -> msgspec.Raw:
    return msgspec.Raw(b"[" + b",".join(items) + b"]")


def _usage(usage: Usage) -> dict[str, Any]:
    counts = usage.json()
    return {
        "input_tokens": counts["prompt_tokens"],
        # What is written to the cache costs nothing, and is not counted.
        "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }


def _owner(request: Request) -> bytes:
    """Whose responses a request may see: the API key's that came with it, or everybody's where none is asked for."""
    key: bytes = request.scope.get("api_key", b"")
    return key


@contextmanager
def _missing(status: int, param: str, name: str, *, code: str | None = None) -> Iterator[None]:
    """Tell a client that a response is not there, or not for it."""
    try:
        yield
    except KeyError as error:
        message = f"the response {name[:100]!r} does not exist, or is not kept any more"
        raise ApiError(status, message, param=param, code=code) from error


@contextmanager
def _in_our_words(body: ResponsesRequest) -> Iterator[None]:
    """Errors of the chat name the fields that the client gave."""
    try:
        yield
    except (ApiError, ValueError) as error:
        told = from_exception(error)
        given = body.model_fields_set
        names = {ours: theirs for ours, theirs in _FIELDS.items() if ours.partition(".")[0] not in given}
        pattern = rf"^({'|'.join(map(re.escape, names))})\b|(?<=exceed )max_completion_tokens"
        message = re.sub(pattern, lambda found: names[found[0]], told.message)
        param = names.get(told.param or "", told.param)
        raise ApiError(told.status, message, param=param, code=told.code, headers=told.headers) from error
