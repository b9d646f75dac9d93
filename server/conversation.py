"""Messages of a chat and what they are made of."""

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from pydantic.json_schema import SkipJsonSchema

from server.request_model import RequestModel, beginning_with
from server.tools import MAX_TOOLS, ToolCall

MAX_MESSAGES = 1024
MAX_PARTS = 1024


class TextPart(RequestModel):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(RequestModel):
    """Where an image is."""

    url: str
    detail: Literal["auto", "low", "high"] | None = "auto"


class ImagePart(RequestModel):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class OtherPart(RequestModel):
    """A kind of part that is not served; always an error."""

    type: Literal["text", "image_url"]


def _part_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if kind in ("text", "image_url") else "other"


Part = Annotated[
    Annotated[TextPart, Tag("text")]
    | Annotated[ImagePart, Tag("image_url")]
    | Annotated[SkipJsonSchema[OtherPart], Tag("other")],
    Discriminator(_part_kind),
]


def _plain_part(part: Part) -> dict[str, Any]:
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image_url"}


def _plain_call(call: ToolCall) -> dict[str, Any]:
    """With arguments as an object, as templates want them."""
    with beginning_with("messages"):
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError("the arguments of a tool call must be the text of a JSON object")
    return {**call.model_dump(exclude_none=True), "function": {"name": call.function.name, "arguments": arguments}}


class Message(RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @property
    def parts(self) -> "list[Part]":
        """Its content as parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content or []

    @property
    def num_characters(self) -> int:
        """Of its texts."""
        return sum(len(part.text) for part in self.parts if isinstance(part, TextPart))

    def plain(self) -> dict[str, Any]:
        """As a template takes it; where its images are is left out."""
        plain = self.model_dump(exclude_none=True, exclude={"content", "tool_calls"})
        if self.tool_calls:
            plain["tool_calls"] = [_plain_call(call) for call in self.tool_calls]
        if self.content is None:
            return plain
        shown = self.content if isinstance(self.content, str) else [_plain_part(part) for part in self.content]
        return {**plain, "content": shown}


def joined_turns(messages: Sequence[Message]) -> list[Message]:
    """Messages of one role that follow each other as one turn, as templates want it; a developer is the system.

    Raises:
        ValueError: a turn has too many parts.
    """
    turns = []
    for role, run in groupby(messages, lambda message: "system" if message.role == "developer" else message.role):
        first, *others = run
        if not others:
            turns.append(first)
            continue
        parts = [part for message in (first, *others) for part in message.parts]
        if len(parts) > MAX_PARTS:
            raise ValueError(
                f"messages: a turn of role {role!r} has {len(parts)} parts: at most {MAX_PARTS} are allowed"
            )
        turns.append(Message(role=first.role, content=parts))
    return turns


class TemplateFields(RequestModel):
    """How a conversation becomes a prompt."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check_template_fields(self) -> None:
        """Raise `ValueError` for contradictions."""
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message of the assistant")
        for message in self.messages:
            if message.content is None and not (message.role == "assistant" and message.tool_calls):
                raise ValueError(f"messages: a message of role {message.role!r} has no content")
            if message.role != "user" and any(isinstance(part, ImagePart) for part in message.content or []):
                raise ValueError(f"messages: a message of role {message.role!r} cannot hold images")

    def image_urls(self) -> list[str]:
        """Where the images are, in order."""
        parts = [part for m in self.messages if isinstance(m.content, list) for part in m.content]
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]
