"""`POST /tokenize` and `POST /detokenize`."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import RootModel

from server.errors import bad_request, blaming
from server.openapi import describe_post
from server.prompts import plain_tools, render
from server.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from server.response_types import Text, Tokens
from server.state import ServerState, read_body, state_of

router = APIRouter()


class _TokenizeRequest(RootModel[dict[str, Any]]):
    """Either kind; which one is seen by its fields."""


@router.post("/tokenize", openapi_extra=describe_post(TokenizeTextRequest, TokenizeChatRequest, answer=Tokens))
async def tokenize(request: Request) -> dict[str, Any]:
    """The token ids of a text or of a conversation, image tokens counted in."""
    state = state_of(request)
    raw = (await read_body(request, _TokenizeRequest)).root
    kind = TokenizeChatRequest if "messages" in raw else TokenizeTextRequest
    body = kind.model_validate(raw)
    state.check_model(body.model)
    async with state.open_request(request):
        with blaming("messages" if isinstance(body, TokenizeChatRequest) else "prompt"):
            tokens = await _tokens(state, body)
    names = state.inputs.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": state.inputs.max_model_len,
        "tokens": tokens,
        "token_strs": names,
    }


@router.post("/detokenize", openapi_extra=describe_post(DetokenizeRequest, answer=Text))
async def detokenize(request: Request) -> dict[str, str]:
    """The text of token ids."""
    state = state_of(request)
    body = await read_body(request, DetokenizeRequest)
    state.check_model(body.model)
    async with state.open_request(request):
        with blaming("tokens"):
            return {"prompt": await state.in_text_pool(state.inputs.decode, body.tokens)}


async def _tokens(state: ServerState, body: TokenizeChatRequest | TokenizeTextRequest) -> list[int]:
    if isinstance(body, TokenizeTextRequest):
        return await state.in_text_pool(_text_tokens, state, body)
    state.inputs.check_image_count(len(body.image_urls()))
    return state.inputs.expand_placeholders(await render(state, body, plain_tools(body.tools)))


def _text_tokens(state: ServerState, body: TokenizeTextRequest) -> list[int]:
    tokens = state.inputs.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    vision = state.config.vision
    if vision is not None and vision.image_token_id in tokens:
        raise bad_request(
            f"prompt holds the text {state.inputs.image_token!r}, which stands for an image: leave it out", "prompt"
        )
    return tokens
