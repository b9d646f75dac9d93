"""Anthropic's requests, and the chat that each of them means. What is not served is refused here."""

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.sampling_params import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from server.conversation import MAX_MESSAGES, MAX_PARTS, ImagePart, ImageUrl, Message, Part, TemplateFields, TextPart
from server.protocol import ChatCompletionRequest
from server.request_model import RequestModel


class Base64Source(RequestModel):
    """An image in the request itself."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp", "image/bmp", "image/tiff"]
    data: str


class UrlSource(RequestModel):
    """An image elsewhere."""

    type: Literal["url"]
    url: str


class ImageBlock(RequestModel):
    """An image."""

    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]

    def part(self) -> ImagePart:
        """As a chat has it."""
        source = self.source
        url = f"data:{source.media_type};base64,{source.data}" if isinstance(source, Base64Source) else source.url
        return ImagePart(type="image_url", image_url=ImageUrl(url=url))


# `cache_control`, on a block or on the request, is one of the unknown fields that are ignored: it asks that the
# prompt up to there be kept, and the engine keeps the beginning of every prompt as long as there is room.
Block = Annotated[TextPart | ImageBlock, Field(discriminator="type")]


class MessageParam(RequestModel):
    """A turn of a conversation, or a piece of one."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(min_length=1, fail_fast=True)]


class Metadata(RequestModel):
    """Whom a request is for; it changes nothing."""

    user_id: str | None = None


class CountTokensRequest(RequestModel):
    """`POST /v1/messages/count_tokens`: what makes up a prompt."""

    model: str
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    thinking: dict[str, Any] | None = None
    tool_choice: dict[str, Any] | None = None
    tools: Any = None
    output_config: Any = None
    output_format: Any = None
    mcp_servers: Any = None
    container: Any = None
    context_management: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    speed: Literal["standard"] | None = None

    @property
    def system_text(self) -> str:
        """What `system` says."""
        return self.system if isinstance(self.system, str) else "\n".join(part.text for part in self.system or [])

    def conversation(self) -> TemplateFields:
        """The conversation as a chat has it; a last turn of the assistant is the beginning of the answer.

        Raises:
            ValueError: a feature is asked for that is not there.
        """
        self._check_served()
        turns = self._turns()
        return TemplateFields(messages=turns, continue_final_message=turns[-1].role == "assistant")

    def _turns(self) -> list[Message]:
        """Messages of one role that follow each other are one turn."""
        turns = [
            _turn(role, [part for message in run for part in _parts(message.content)])
            for role, run in groupby(self.messages, lambda message: message.role)
        ]
        if turns[-1].role == "assistant" and _is_blank(turns[-1]):
            turns.pop()  # an answer that begins with nothing, of which a template would make one that has ended
        if not turns:
            raise ValueError("messages: there is nothing to answer")
        if self.system:
            turns.insert(0, _turn("system", _parts(self.system)))
        return turns

    def _check_served(self) -> None:
        for name in _NOT_SERVED:
            if getattr(self, name):
                raise ValueError(f"{name} is not available")
        for name, harmless in _SERVED_TYPES.items():
            value = getattr(self, name)
            if value is not None and value.get("type") not in harmless:
                raise ValueError(f"{name} is not available: leave it out, or set its type to {harmless[0]!r}")


_NOT_SERVED = (
    "tools", "output_config", "output_format", "mcp_servers", "container", "context_management", "diagnostics",
    "inference_geo",
)  # fmt: skip
# Without tools, both of these choices mean an answer in words.
_SERVED_TYPES = {"thinking": ("disabled",), "tool_choice": ("none", "auto")}

_StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`."""

    max_tokens: int
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Annotated[list[_StopSequence], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    stream: bool | None = False
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def chat(self) -> ChatCompletionRequest:
        """The chat that this means.

        Raises:
            ValueError: a feature is asked for that is not there.
        """
        conversation = self.conversation()
        return ChatCompletionRequest(
            model=self.model,
            messages=conversation.messages,
            continue_final_message=conversation.continue_final_message,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
        )


def _parts(content: str | Sequence[TextPart | ImageBlock]) -> list[Part]:
    """Content as a chat has it."""
    if isinstance(content, str):
        return [TextPart(type="text", text=content)]
    return [block.part() if isinstance(block, ImageBlock) else block for block in content]


def _turn(role: Literal["system", "user", "assistant"], parts: list[Part]) -> Message:
    if len(parts) > MAX_PARTS:
        raise ValueError(f"messages: a turn of role {role!r} has {len(parts)} blocks: at most {MAX_PARTS} are allowed")
    return Message(role=role, content=parts)


def _is_blank(turn: Message) -> bool:
    return all(isinstance(part, TextPart) and not part.text.strip() for part in turn.content or [])
