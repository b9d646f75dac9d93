"""OpenAI's requests, with the extensions that vLLM made usual. What is not served is refused here."""

import json
from collections import Counter
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from engine.grammar.structured_outputs import StructuredOutputs
from engine.sampling_params import MAX_COUNT, MAX_LIST, SamplingParams
from server import tools
from server.conversation import TemplateFields
from server.request_model import RequestModel, beginning_with
from server.tool_parsers import MARKED_BY_SPECIAL_TOKENS, PARSERS
from server.tools import MAX_TOOLS, Choice, NamedToolChoice, Tool, ToolUse

MAX_PROMPTS = 128
_LONGEST_ID = 12
"""Digits of a token id, and more."""

# The first wrong element ends the check of a list, however long that is.
_Ids = Annotated[list[int], Field(fail_fast=True)]
_Texts = Annotated[list[str], Field(fail_fast=True)]


def _few(bias: Any) -> Any:
    """Counted before the entries are looked at one by one."""
    if isinstance(bias, dict) and len(bias) > MAX_LIST:
        raise ValueError(f"holds {len(bias)} entries: at most {MAX_LIST} are allowed")
    return bias


_Bias = Annotated[dict[str, float], BeforeValidator(_few)]


class StreamOptions(RequestModel):
    """What a stream tells beside its text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class SamplingFields(RequestModel):
    """The fields that chat and completions share."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stop: str | _Texts | None = None
    seed: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    logit_bias: _Bias | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: _Ids | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: _Texts | None = None
    allowed_token_ids: _Ids | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    best_of: int | None = None
    audio: Any = None
    documents: Any = None
    function_call: Any = None
    functions: Any = None
    guided_choice: Any = None
    guided_decoding_backend: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_whitespace_pattern: Any = None
    kv_transfer_params: Any = None
    logits_processors: Any = None
    media_io_kwargs: Any = None
    mm_processor_kwargs: Any = None
    prediction: Any = None
    prompt_embeds: Any = None
    return_tokens_as_token_ids: Any = None
    thinking_token_budget: Any = None
    use_beam_search: Any = None
    vllm_xargs: Any = None
    web_search_options: Any = None
    detokenize: Any = None
    early_stopping: Any = None
    length_penalty: Any = None
    modalities: Any = None
    reasoning_effort: Any = None
    spaces_between_special_tokens: Any = None
    verbosity: Any = None

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, options: StreamOptions | None, info: Any) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("only allowed with stream")
        return options

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk tells the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_served(self) -> None:
        """Raise `ValueError` for a feature that is not there."""
        for name in _NOT_SERVED:
            value = getattr(self, name)
            if name in _FORMS and value is not None:  # an empty schema is one too
                raise ValueError(f"{name} is not available: give structured_outputs with {name[len('guided_') :]!r}")
            if value:
                raise ValueError(f"{name} is not available")
        for name, only in _SERVED_AS.items():
            if getattr(self, name) not in (None, only):
                raise ValueError(f"{name} is not available: only {json.dumps(only)} is")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(
                f"best_of is {self.best_of}, which is not available: only the value of n, {self.n or 1}, is"
            )
        if self.store:
            raise ValueError("store is not available: nothing is kept after the answer")
        if self.service_tier not in (None, "auto", "default"):
            raise ValueError(f"service_tier {self.service_tier!r} is not available: 'auto' and 'default' are")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs cannot be streamed")

    @property
    def form_field(self) -> str:
        """The field that says what an answer must look like, if there is one."""
        is_text = self.response_format is None or self.response_format.get("type") == "text"
        return "structured_outputs" if is_text else "response_format"

    def form(self) -> StructuredOutputs | None:
        """What an answer must look like.

        Raises:
            ValueError: the field is wrong.
        """
        if self.response_format is None or self.response_format.get("type") == "text":
            if self.structured_outputs is None:
                return None
            with beginning_with("structured_outputs"):
                return StructuredOutputs.from_dict(self.structured_outputs)
        if self.structured_outputs is not None:
            raise ValueError("response_format and structured_outputs exclude each other")
        kind = self.response_format.get("type")
        if kind == "json_object":
            return StructuredOutputs(json_object=True)
        if kind != "json_schema":
            raise ValueError(
                f"response_format {_shown(kind)} is not available: 'text', 'json_object' and 'json_schema' are"
            )
        described = self.response_format.get("json_schema")
        schema = described.get("schema", {}) if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise ValueError("response_format.json_schema must be an object with a schema, an object too")
        return StructuredOutputs(json=schema)

    def sampling_params(
        self,
        defaults: dict[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        form: StructuredOutputs | None = None,
    ) -> SamplingParams:
        """The engine's parameters: the request's, else the checkpoint's, else OpenAI's.

        Raises:
            ValueError: a value is out of range.
        """
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        values = defaults | {name: value for name, value in given.items() if value is not None}
        if self.logit_bias:
            values["logit_bias"] = _bias(self.logit_bias)
        form = self.form() if form is None else form
        if form is not None:
            values["structured_outputs"] = form
        return SamplingParams(**values, max_tokens=max_tokens, logprobs=logprobs)


_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "include_stop_str_in_output",
    "skip_special_tokens", "bad_words", "allowed_token_ids", "prompt_logprobs",
)  # fmt: skip
# Names that clients send; ignored, they would give other answers than were asked for.
_FORMS = ("guided_choice", "guided_grammar", "guided_json", "guided_regex")
_NOT_SERVED = (
    *_FORMS, "audio", "documents", "function_call", "functions", "guided_decoding_backend", "guided_whitespace_pattern",
    "kv_transfer_params", "logits_processors", "media_io_kwargs", "mm_processor_kwargs", "prediction", "prompt_embeds",
    "return_tokens_as_token_ids", "thinking_token_budget", "use_beam_search", "vllm_xargs", "web_search_options",
)  # fmt: skip
_SERVED_AS: dict[str, Any] = {
    "detokenize": True,
    "early_stopping": False,
    "length_penalty": 1,
    "modalities": ["text"],
    "reasoning_effort": "none",
    "spaces_between_special_tokens": True,
    "verbosity": "medium",
}
"""The one value of a field with which answers are as they always are."""


class ChatCompletionRequest(TemplateFields, SamplingFields):
    """`POST /v1/chat/completions`."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None

    def check_served(self) -> None:
        """Raise `ValueError` for a feature that is not there, or a contradiction."""
        super().check_served()
        self.check_template_fields()
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice demands a call, but there are no tools")
        names = Counter(tool.function.name for tool in self.tools or [])
        for name, count in names.items():
            if count > 1:
                raise ValueError(f"tools holds the function {name!r} twice")
        if self.echo:
            raise ValueError("echo is not available for chat: use it with completions")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")

    def tool_use(self, parser: str | None) -> ToolUse | None:
        """How tools are used; None where there are none, or none is to be called.

        Args:
            parser: of the model's own format, by name; needed where the model may choose.

        Raises:
            ValueError: what is asked for contradicts itself, or needs a parser.
        """
        choice = self.tool_choice or "auto"
        if not self.tools or choice == "none":
            return None
        most_calls = 1 if self.parallel_tool_calls is False else MAX_TOOLS
        if choice == "auto":
            if parser is None:
                raise ValueError(
                    "tool_choice 'auto' needs a server that was started with --tool-call-parser: "
                    "'none', 'required' and a function are available"
                )
            if self.form() is not None and self.form_field == "response_format":  # a grammar may describe calls
                raise ValueError(
                    "response_format leaves no room for calls: set tool_choice to 'none', or leave one of them out"
                )
            keeps = parser in MARKED_BY_SPECIAL_TOKENS
            names = frozenset(tool.function.name for tool in self.tools)
            return ToolUse(partial(PARSERS[parser], names=names), most_calls=most_calls, keeps_special_tokens=keeps)
        if self.form() is not None:
            raise ValueError(f"tool_choice demands a call, which {self.form_field} excludes")
        if isinstance(choice, NamedToolChoice):
            return tools.named_call(self.tools, choice.function.name)
        return tools.some_call(self.tools, most_calls)

    def params(self, defaults: dict[str, Any], use: ToolUse | None = None) -> SamplingParams:
        """The engine's parameters."""
        wanted = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        form = None if use is None else use.form
        params = self.sampling_params(defaults, max_tokens=wanted, logprobs=logprobs, form=form)
        if use is not None and use.keeps_special_tokens:
            params.skip_special_tokens = False
        return params


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: Annotated[
        str | _Texts | _Ids | Annotated[list[_Ids], Field(fail_fast=True)],
        Field(description="one prompt or several, as text or as token ids"),
    ]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    def check_served(self) -> None:
        """Raise `ValueError` for a feature that is not there, or a contradiction."""
        super().check_served()
        if self.suffix:
            raise ValueError("suffix is not available: the model cannot fill in the middle")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0: it must be at least 1, except with echo")
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be streamed")
        if len(self.prompts()) > MAX_PROMPTS:
            raise ValueError(f"prompt holds {len(self.prompts())} prompts: at most {MAX_PROMPTS} are allowed")
        if not self.prompts():
            raise ValueError("prompt is empty")

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    def params(self, defaults: dict[str, Any]) -> SamplingParams:
        """The engine's parameters."""
        wanted = 16 if self.max_tokens is None else 1 if self.max_tokens == 0 else self.max_tokens
        params = self.sampling_params(defaults, max_tokens=wanted, logprobs=self.logprobs)
        if self.echo and self.logprobs is not None and params.prompt_logprobs is None:
            params.prompt_logprobs = self.logprobs
        return params


REQUEST_FIELDS = ChatCompletionRequest.model_fields.keys() | CompletionRequest.model_fields.keys()


class TokenizeTextRequest(RequestModel):
    """`POST /tokenize` with a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(TemplateFields):
    """`POST /tokenize` with a conversation."""

    model: str | None = None
    return_token_strs: bool | None = False
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    truncate_prompt_tokens: Any = None

    def check_template_fields(self) -> None:
        """Raise `ValueError` for contradictions, and for what is not there."""
        super().check_template_fields()
        if self.truncate_prompt_tokens is not None:
            raise ValueError("truncate_prompt_tokens is not available for tokenizing messages")


class DetokenizeRequest(RequestModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: _Ids


def _shown(kind: Any) -> str:
    """A value for a message; of what is no string only the kind, since it may be of any size."""
    return repr(kind[:100]) if isinstance(kind, str) else f"with a type that is a {type(kind).__name__}"


def _bias(given: dict[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdigit() and len(token) < _LONGEST_ID for token in given):
        raise ValueError("logit_bias: its keys must be token ids")
    biases = {int(token): bias for token, bias in given.items()}
    if len(biases) < len(given):
        raise ValueError("logit_bias: a token id is there twice, with zeros before it")
    return biases
