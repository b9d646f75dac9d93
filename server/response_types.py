"""What most endpoints answer, for the description at /openapi.json; the newer ones have files of their own.

The handlers build these objects as plain dictionaries, since they make one for each token. Every key is named here: a
key that is not always there is `NotRequired`, and other keys do not come.
"""

from typing import Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

closed = with_config(ConfigDict(extra="forbid"))
"""Decorates the types of objects that hold no other keys."""

Finish = Literal["stop", "length"]
ChatFinish = Literal["stop", "length", "tool_calls"]


@closed
class PromptTokensDetails(TypedDict):
    """What the prompt's tokens were."""

    cached_tokens: int
    image_tokens: int


@closed
class Usage(TypedDict):
    """Token counts; expanded image tokens count as prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@closed
class PromptLogprob(TypedDict):
    """One candidate for a position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each prompt token a table by token id; null for the first."""


@closed
class TopLogprob(TypedDict):
    """One of the most probable tokens."""

    token: str
    logprob: float
    bytes: list[int]


@closed
class TokenLogprob(TypedDict):
    """A token of the answer and its rivals."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


@closed
class ChatLogprobs(TypedDict):
    """The answer's tokens; they join to its text."""

    content: list[TokenLogprob]
    refusal: None


@closed
class CalledFunction(TypedDict):
    """A function's name, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


@closed
class MadeToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


@closed
class ChatMessage(TypedDict):
    """An answer; its content is null where it has calls of tools and no text."""

    role: str
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[MadeToolCall]]


@closed
class ChatChoice(TypedDict):
    """One of the `n` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]


@closed
class ChatCompletion(TypedDict):
    """The answer to a chat request in one piece."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


@closed
class FunctionDelta(TypedDict):
    """A call's name, or what comes new of its arguments."""

    name: NotRequired[str]
    arguments: str


@closed
class ToolCallDelta(TypedDict):
    """What comes new of a call: its id and name first."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


@closed
class ChatDelta(TypedDict):
    """What comes new of an answer."""

    role: NotRequired[str]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


@closed
class ChatChunkChoice(TypedDict):
    """A piece of one of the `n` answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]


@closed
class ChatCompletionChunk(TypedDict):
    """A piece of a chat answer; the last one, with the usage, has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]


@closed
class CompletionLogprobs(TypedDict):
    """Four lists of equal length; null stands for what the first token of an echoed prompt does not have."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@closed
class CompletionChoice(TypedDict):
    """One of a prompt's `n` answers."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish
    stop_reason: int | str | None
    prompt_logprobs: NotRequired[PromptLogprobs]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


@closed
class Completion(TypedDict):
    """The continuation of the prompts in one piece."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


@closed
class CompletionChunkChoice(TypedDict):
    """A piece of one of a prompt's `n` answers."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


@closed
class CompletionChunk(TypedDict):
    """A piece of the continuations; the last one, with the usage, has no choices."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage | None]


@closed
class Tokens(TypedDict):
    """The tokens of a text or of a conversation."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@closed
class Text(TypedDict):
    """The text of tokens."""

    prompt: str


@closed
class Model(TypedDict):
    """A name under which the model is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


@closed
class ModelList(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


@closed
class Versions(TypedDict):
    """Of this program and of what it stands on."""

    version: str
    torch: str
    transformers: str


@closed
class Error(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


@closed
class ErrorResponse(TypedDict):
    """Every answer other than 200."""

    error: Error
