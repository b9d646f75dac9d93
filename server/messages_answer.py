"""What `/v1/messages` and what is below it answer, for the description at /openapi.json."""

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from server.response_types import closed


@closed
class TextBlock(TypedDict):
    """The text of an answer."""

    type: Literal["text"]
    text: str


@closed
class MessageUsage(TypedDict):
    """Token counts; expanded image tokens count as input, of the cache or not."""

    input_tokens: int
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int
    output_tokens: int


StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


@closed
class MessageObject(TypedDict):
    """An answer; it has one block, and none while it only begins."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


@closed
class TokenCount(TypedDict):
    """The size of a prompt."""

    input_tokens: int


@closed
class MessageError(TypedDict):
    """What went wrong."""

    type: str
    message: str


@closed
class MessageErrorResponse(TypedDict):
    """Every answer other than 200, and the last event of a stream that fails."""

    type: Literal["error"]
    error: MessageError


@closed
class MessageStartEvent(TypedDict):
    """The message as it begins."""

    type: Literal["message_start"]
    message: MessageObject


@closed
class BlockStartEvent(TypedDict):
    """The only block begins, empty."""

    type: Literal["content_block_start"]
    index: Literal[0]
    content_block: TextBlock


@closed
class TextDelta(TypedDict):
    """What comes new of the text."""

    type: Literal["text_delta"]
    text: str


@closed
class BlockDeltaEvent(TypedDict):
    """The block grows."""

    type: Literal["content_block_delta"]
    index: Literal[0]
    delta: TextDelta


@closed
class BlockStopEvent(TypedDict):
    """The block is complete."""

    type: Literal["content_block_stop"]
    index: Literal[0]


@closed
class MessageStop(TypedDict):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


@closed
class MessageDeltaEvent(TypedDict):
    """The end of the message, and its usage."""

    type: Literal["message_delta"]
    delta: MessageStop
    usage: MessageUsage


@closed
class MessageStopEvent(TypedDict):
    """The last event of a stream."""

    type: Literal["message_stop"]


@closed
class PingEvent(TypedDict):
    """Nothing new."""

    type: Literal["ping"]


MessageStreamEvent = Annotated[
    MessageStartEvent
    | PingEvent
    | BlockStartEvent
    | BlockDeltaEvent
    | BlockStopEvent
    | MessageDeltaEvent
    | MessageStopEvent
    | MessageErrorResponse,
    Field(discriminator="type"),
]
