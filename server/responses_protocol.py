"""The request of `POST /v1/responses`, and how it reads as a chat. What is not served is refused here."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic.json_schema import SkipJsonSchema

from server.conversation import MAX_MESSAGES, MAX_PARTS, ImagePart, ImageUrl, Message, Part, TextPart, joined_turns
from server.errors import bad_request
from server.protocol import ChatCompletionRequest, SamplingFields, StreamOptions
from server.request_model import RequestModel

LOGPROBS = "message.output_text.logprobs"
"""What `include` holds to have log probabilities."""

# What these may be; anything else asks for what is not there, or for what goes by another name here.
_SERVED: dict[str, tuple[Any, ...]] = {
    "background": (False,), "context_management": ([],), "conversation": (), "max_completion_tokens": (),
    "max_tokens": (), "max_tool_calls": (), "moderation": (), "n": (1,), "prompt": (),
    "prompt_cache_retention": ("in_memory",), "prompt_logprobs": (), "return_token_ids": (False,),
    "tool_choice": ("auto", "none"), "tools": ([],), "truncation": ("disabled",),
}  # fmt: skip
# Fields of `SamplingFields` that a chat is not given: what they ask for is done around it.
_AROUND_CHAT = {"stream", "stream_options", "store", "metadata", "user"}


class InputText(RequestModel):
    """A piece of text, of the client or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: str

    def part(self) -> Part:
        """The same for a chat."""
        return TextPart(type="text", text=self.text)


class InputImage(RequestModel):
    """An image."""

    type: Literal["input_image"]
    file_id: None = None
    image_url: str
    detail: Literal["auto", "low", "high"] | None = "auto"

    def part(self) -> Part:
        """The same for a chat."""
        return ImagePart(type="image_url", image_url=ImageUrl(url=self.image_url, detail=self.detail))


class OtherInput(RequestModel):
    """A kind of part that is not served; always an error."""

    type: Literal["input_text", "output_text", "input_image"]

    def part(self) -> Part:
        """There is none."""
        raise NotImplementedError


def _part_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return {"input_text": "text", "output_text": "text", "input_image": "image_url"}.get(str(kind), "other")


InputPart = Annotated[
    Annotated[InputText, Tag("text")]
    | Annotated[InputImage, Tag("image_url")]
    | Annotated[SkipJsonSchema[OtherInput], Tag("other")],
    Discriminator(_part_kind),
]


class InputMessage(RequestModel):
    """One turn of a conversation: the only kind of item that is served."""

    type: Literal["message"] | None = "message"
    role: Literal["user", "assistant", "system", "developer"]
    # Lists come first in these unions: their complaints tell more.
    content: Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True)] | str

    def message(self) -> Message:
        """The same for a chat."""
        content = self.content if isinstance(self.content, str) else [part.part() for part in self.content]
        return Message(role=self.role, content=content)


class TextConfig(RequestModel):
    """The form of the answer."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseStreamOptions(StreamOptions):
    """What a stream tells beside its text; the usage is in its last event always."""

    include_obfuscation: bool | None = False


_MOST_PAIRS = 16
_Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


def _few_pairs(metadata: Any) -> Any:
    """Counted before the pairs are looked at one by one."""
    if isinstance(metadata, dict) and len(metadata) > _MOST_PAIRS:
        raise ValueError(f"holds {len(metadata)} pairs: at most {_MOST_PAIRS} are allowed")
    return metadata


_FORMAT_FIELDS = {"name": str, "description": str, "schema": dict, "strict": bool}
_LONGEST_DESCRIPTION = 4096
"""Characters. It is told again, as the schema is, which has a bound of its own."""
_Name = Annotated[str, Field(max_length=512)]
"""Told again in the answer and kept with it, so that it has a bound."""


class ResponsesRequest(SamplingFields):
    """`POST /v1/responses`, with the extensions that chat and completions have."""

    input: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | str
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    previous_response_id: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: _Name | None = None
    safety_identifier: _Name | None = None
    user: _Name | None = None
    metadata: Annotated[_Metadata, BeforeValidator(_few_pairs)] | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextConfig | None = None
    reasoning: dict[str, Any] | None = None
    background: bool | None = None
    context_management: Any = None
    conversation: Any = None
    max_completion_tokens: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    prompt: Any = None
    prompt_cache_retention: Any = None
    tool_choice: Any = None
    tools: Any = None
    truncation: Any = None

    @property
    def is_stored(self) -> bool:
        """Whether the response is kept after the answer, as it is unless told otherwise."""
        return self.store is not False

    @property
    def has_form(self) -> bool:
        """Whether anything is said of what the answer must look like."""
        return self._response_format() is not None or self.structured_outputs is not None

    def check_served(self) -> None:
        """Refuse, with a 400, what is not there; `chat` leaves to the chat what that refuses too."""
        for name, served in _SERVED.items():
            _check(name, getattr(self, name), *served)
        for name in self.include or []:
            _check("include", name, LOGPROBS)
        if self.text is not None:
            kind = None if self.text.format is None else self.text.format.get("type") or ""
            _check("text.format", kind, "text", "json_object", "json_schema")
            _check("text.verbosity", self.text.verbosity, "medium")
            if self.text.format is not None and self.response_format is not None:
                raise bad_request("response_format and text.format say the same: give one of them", "response_format")
        for name, value in self._format()[1].items():
            if name in _FORMAT_FIELDS and isinstance(value, str) and len(value) > _LONGEST_DESCRIPTION:
                raise bad_request(
                    f"text.format.{name} has {len(value)} characters: at most {_LONGEST_DESCRIPTION} are allowed",
                    "text.format",
                )
        for name, value in (self.reasoning or {}).items():
            _check(f"reasoning.{name[:50]}", value, *(["none"] if name == "effort" else []))
        if self.stream_options is not None:
            for name in ("include_obfuscation", "continuous_usage_stats"):
                _check(f"stream_options.{name}", getattr(self.stream_options, name), False)
        if self.top_logprobs and LOGPROBS not in (self.include or []):
            raise bad_request(f"top_logprobs needs include to hold {LOGPROBS!r}", "top_logprobs")

    def messages(self) -> list[Message]:
        """The input as turns of a chat."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        return [item.message() for item in self.input]

    def chat(self, before: list[Message], messages: list[Message]) -> ChatCompletionRequest:
        """The chat that this request means, `messages` after those of the responses before it.

        Raises:
            ValidationError: the conversation is too long, or a value is out of range.
        """
        system = [Message(role="system", content=self.instructions)] if self.instructions else []
        turns = joined_turns([*system, *before, *messages])
        shared = SamplingFields.model_fields.keys() - _AROUND_CHAT
        return ChatCompletionRequest(
            **{name: getattr(self, name) for name in shared - {"response_format"}},
            response_format=self._response_format(),
            messages=turns,
            max_completion_tokens=self.max_output_tokens,
            logprobs=LOGPROBS in (self.include or []),
            top_logprobs=self.top_logprobs,
        )

    def _response_format(self) -> dict[str, Any] | None:
        """The form of the answer as a chat has it."""
        wanted = None if self.text is None else self.text.format
        if wanted is None:
            return self.response_format
        if wanted.get("type") == "json_schema":
            return {"type": "json_schema", "json_schema": wanted}
        return wanted

    def _told_format(self) -> dict[str, Any]:
        """What is known of the form that was asked for, and nothing else that a client may have put there."""
        kind, described = self._format()
        told = {
            name: described[name] for name, right in _FORMAT_FIELDS.items() if isinstance(described.get(name), right)
        }
        return {**told, "type": kind}

    def _format(self) -> tuple[str, dict[str, Any]]:
        """The form's type, and the description of a schema."""
        given = self._response_format() or {"type": "text"}
        described = given.get("json_schema") if given.get("type") == "json_schema" else None
        return str(given.get("type")), described if isinstance(described, dict) else {}

    def told_again(self) -> dict[str, Any]:
        """The fields of the response that say what was asked for."""
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": None,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": self.is_stored,
            "text": {"format": self._told_format()},
            "tool_choice": self.tool_choice or "auto",
            "tools": [],
            "top_logprobs": self.top_logprobs or 0,
            "truncation": "disabled",
            "user": self.user,
        }


def _check(name: str, value: Any, *served: Any) -> None:
    if value is None or value in served:
        return
    choice = f", or give {' or '.join(map(repr, served))}" if served else ""
    raise bad_request(f"{name} is not available here with this value: leave it out{choice}", name)
