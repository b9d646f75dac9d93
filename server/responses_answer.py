"""What `/v1/responses` answers, for the description at /openapi.json."""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from server.response_types import TokenLogprob, closed

_Nothing = Annotated[list[Any], Field(max_length=0)]


@closed
class OutputText(TypedDict):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: _Nothing
    logprobs: list[TokenLogprob]


@closed
class OutputMessage(TypedDict):
    """An answer; it has one part, and none before the first."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


@closed
class InputTokensDetails(TypedDict):
    """What the prompt's tokens were."""

    cached_tokens: int
    image_tokens: int
    cache_write_tokens: Literal[0]


@closed
class OutputTokensDetails(TypedDict):
    """What the answer's tokens were."""

    reasoning_tokens: Literal[0]


@closed
class ResponseUsage(TypedDict):
    """Token counts; expanded image tokens count as input tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


@closed
class ResponseFailure(TypedDict):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


@closed
class IncompleteDetails(TypedDict):
    """Why a response ended before its end."""

    reason: Literal["max_output_tokens"]


@closed
class Reasoning(TypedDict):
    """There is none."""

    effort: None
    summary: None


class TextFormat(TypedDict):
    """As asked for."""

    type: Literal["text", "json_object", "json_schema"]


@closed
class ResponseText(TypedDict):
    """The form of the answer."""

    format: TextFormat


@closed
class ResponseObject(TypedDict):
    """A response, and what was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputMessage]
    usage: ResponseUsage | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Reasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: ResponseText
    tool_choice: Literal["auto", "none"]
    tools: _Nothing
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


@closed
class DeletedResponse(TypedDict):
    """A response that was there."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


@closed
class ResponseEvent(TypedDict):
    """Where the response is: the first two events of a stream and its last."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    sequence_number: int
    response: ResponseObject


@closed
class OutputItemEvent(TypedDict):
    """The answer begins, or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputMessage


@closed
class ContentPartEvent(TypedDict):
    """Its only part begins, or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


@closed
class TextDeltaEvent(TypedDict):
    """What comes new of the text."""

    type: Literal["response.output_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


@closed
class TextDoneEvent(TypedDict):
    """All of the text."""

    type: Literal["response.output_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[TokenLogprob]


ResponseStreamEvent = Annotated[
    ResponseEvent | OutputItemEvent | ContentPartEvent | TextDeltaEvent | TextDoneEvent, Field(discriminator="type")
]
