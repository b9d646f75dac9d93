"""`POST /v1/messages`: Anthropic's form of a chat. The work is the chat's; here are the shapes."""

import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.chat import Chat, start_chat
from server.errors import ApiError, blaming
from server.generation import Answer
from server.messages_answer import MessageErrorResponse, MessageObject, MessageStreamEvent, TokenCount
from server.messages_protocol import CountTokensRequest, MessagesRequest
from server.openapi import describe_post
from server.prompts import check_system_text, render
from server.sse import NamedEventStream, json_response, unless_client_goes
from server.state import ServerState, let_go, read_body, state_of

router = APIRouter()

_STOP_REASONS = {None: None, "stop": "end_turn", "length": "max_tokens"}


@router.post(
    "/v1/messages",
    openapi_extra=describe_post(
        MessagesRequest, answer=MessageObject, event=MessageStreamEvent, is_named=True, error=MessageErrorResponse
    ),
)
async def create_message(request: Request) -> Response:
    """Answer a conversation, in one piece or as a stream."""
    arrived = time.monotonic()
    state = state_of(request)
    body = await read_body(request, MessagesRequest)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(state.open_request(request))
        chat = await unless_client_goes(request, _start(state, body, arrived))
        stack.callback(chat.abort)
        let_go(request, body, "stream")
        reply = Reply(chat)
        if not body.stream:
            return json_response(await unless_client_goes(request, reply.whole()))
        return MessageStream(reply.events(), stack.pop_all())


@router.post(
    "/v1/messages/count_tokens",
    openapi_extra=describe_post(CountTokensRequest, answer=TokenCount, error=MessageErrorResponse),
)
async def count_tokens(request: Request) -> dict[str, int]:
    """How many tokens the same conversation's prompt has, images included."""
    state = state_of(request)
    body = await read_body(request, CountTokensRequest)
    state.check_model(body.model)
    async with state.open_request(request):
        return {"input_tokens": await unless_client_goes(request, _count(state, body))}


async def _start(state: ServerState, body: MessagesRequest, arrived: float) -> Chat:
    check_system_text(state, "system", body.system_text)
    return await start_chat(state, await state.in_text_pool(body.chat), arrived)


async def _count(state: ServerState, request: CountTokensRequest) -> int:
    check_system_text(state, "system", request.system_text)
    body = await state.in_text_pool(request.conversation)
    urls = body.image_urls()
    with blaming("messages"), state.engine.admission(1):
        state.inputs.check_image_count(len(urls))
        token_ids = await render(state, body)
        # Every image has the same number of tokens, so that those elsewhere need not be fetched. Those that are here
        # are looked at: the request that follows finds them prepared.
        await state.load_images([url for url in urls if state.media.check(url) not in ("http", "https")])
    return len(state.inputs.expand_placeholders(token_ids))


class MessageStream(NamedEventStream):
    """Events whose errors have Anthropic's shape."""

    def error_event(self, error: ApiError) -> dict[str, Any]:
        """What is sent of an error."""
        return error.anthropic_body()


class Reply:
    """A chat's answer in Anthropic's shapes."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._id = f"msg_{uuid4().hex}"

    async def whole(self) -> dict[str, Any]:
        """The response in one piece."""
        answer = Answer()
        async with aclosing(self._chat.deltas()) as deltas:
            async for delta in deltas:
                answer.add(delta)
        return self._message([_text_block("".join(answer.text))], _stop(answer.finish_reason, answer.stop_reason))

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream: one block of text, in a message."""
        # How much of the prompt was cached is not known yet; `message_delta` tells.
        yield {"type": "message_start", "message": self._message([], _stop(None, None))}
        yield {"type": "content_block_start", "index": 0, "content_block": _text_block("")}
        yield {"type": "ping"}
        async with aclosing(self._chat.deltas()) as deltas:
            async for delta in deltas:
                if delta.text:
                    change = {"type": "text_delta", "text": delta.text}
                    yield {"type": "content_block_delta", "index": 0, "delta": change}
                if delta.finish_reason is not None:
                    yield {"type": "content_block_stop", "index": 0}
                    stop = _stop(delta.finish_reason, delta.stop_reason)
                    yield {"type": "message_delta", "delta": stop, "usage": self._usage()}
        yield {"type": "message_stop"}

    def _message(self, content: list[dict[str, Any]], stop: dict[str, str | None]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._chat.model,
            "content": content,
            **stop,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        usage = self._chat.usage
        cached = sum(usage.cached_tokens.values())
        return {
            "input_tokens": usage.prompt_tokens - cached,
            # What is written to the cache is written anyway and costs nothing more: those are plain input tokens.
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage.completion_tokens,
        }


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _stop(finish_reason: str | None, stop_reason: int | str | None) -> dict[str, str | None]:
    """Why the answer ended, both fields null while it goes on."""
    if isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    return {"stop_reason": _STOP_REASONS[finish_reason], "stop_sequence": None}
