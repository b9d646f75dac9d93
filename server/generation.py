"""What chat and completions share: running a request and shaping usage and log probabilities."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from engine.client import ResponseStream
from engine.input_processor import ProcessedPrompt
from engine.outputs import Delta, TokenLogprobs
from engine.sampling_params import SamplingParams
from server import notes
from server.errors import ApiError
from server.state import ServerState

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_PROMPT_LOGPROBS = 1 << 17
MOST_LOGPROBS = 1 << 20
"""Of one request. Each takes some hundred bytes of its answer."""
_SHOWN_AT_ONCE = 64

# JSON has no infinity; OpenAI writes this for a token that cannot come.
_LOWEST_LOGPROB = -9999.0


def encoded(value: Any) -> msgspec.Raw:
    """JSON of a value, to be put into an answer as it is."""
    return msgspec.Raw(msgspec.json.encode(value))


async def shown_in_turns(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of each of very many items; others get their turns in between."""
    results: list[Result] = []
    for start in range(0, len(items), _SHOWN_AT_ONCE):
        results += map(function, items[start : start + _SHOWN_AT_ONCE])
        await asyncio.sleep(0)
    return results


@dataclass(slots=True)
class Answer:
    """One choice, all of it."""

    shown: Callable[[TokenLogprobs], Any] = encoded
    """How log probabilities are kept: as they are they take several times the room, and long to show at the end."""
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        """Append what came new."""
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += map(self.shown, delta.logprobs)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request."""

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)
    """Of each prompt."""

    @classmethod
    def of(cls, prompts: Sequence[ProcessedPrompt]) -> "Usage":
        """Before anything is generated."""
        return cls(sum(len(prompt.token_ids) for prompt in prompts), sum(p.num_image_tokens for p in prompts))

    def add(self, prompt: int, delta: Delta) -> None:
        """Count what came new for a prompt, by its number."""
        self.completion_tokens += len(delta.token_ids)
        if delta.index == 0:  # the others find what the first has just made
            self.cached_tokens[prompt] = max(self.cached_tokens.get(prompt, 0), delta.num_cached_tokens)

    def json(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(self.cached_tokens.values()),
                "image_tokens": self.image_tokens,
            },
        }


def check_logprobs(params: SamplingParams, prompts: Sequence[ProcessedPrompt], limits: Sequence[int]) -> None:
    """Refuse more log probabilities than one answer should hold.

    Args:
        params: of the request.
        prompts: of the request.
        limits: tokens that the answers to each prompt may have.

    Raises:
        ValueError: they are too many.
    """
    if params.logprobs is not None:
        count = sum(limits) * params.n * (params.logprobs + 1)
        if count > MOST_LOGPROBS:
            raise ValueError(
                f"logprobs: up to {count} log probabilities of all answers' tokens are asked for: at most "
                f"{MOST_LOGPROBS} are allowed; lower max_tokens, n or the number of rivals"
            )
    if params.prompt_logprobs is None:
        return
    count = sum(len(prompt.token_ids) for prompt in prompts) * params.n * (params.prompt_logprobs + 1)
    if count > MOST_PROMPT_LOGPROBS:
        raise ValueError(
            f"prompt_logprobs: {count} log probabilities of all prompts' tokens are asked for, for each of n answers: "
            f"at most {MOST_PROMPT_LOGPROBS} are allowed"
        )


def accepted(state: ServerState, usage: Usage, params: SamplingParams, *, name: str, model: str) -> None:
    """A request is on its way to the engine: what is known of it now."""
    state.metrics.prompt(usage.prompt_tokens)
    noted = notes.current()
    if noted is not None:
        noted.name, noted.model, noted.params, noted.usage = name, model, params, usage


async def run(
    state: ServerState, streams: Sequence[ResponseStream], *, generates: bool = True
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of one or several prompts' streams as they come, each with the number of its stream.

    Args:
        state: of the server.
        streams: of the prompts.
        generates: False leaves out the one token that the engine makes where only the prompt is wanted.

    Raises:
        ApiError: the engine gave one of them up.
        EngineDeadError: the engine process ended.
    """
    last_token_at: dict[tuple[int, int], float] = {}
    noted = notes.current()
    async with aclosing(_merge(streams)) as deltas:
        async for number, delta in deltas:
            now, answer = time.monotonic(), (number, delta.index)
            if not generates and delta.error is None:
                delta = replace(delta, text="", token_ids=[], logprobs=[], finish_reason="length", stop_reason=None)
            state.metrics.delta(delta, last_token_at.get(answer, 0.0), now)
            if noted is not None:
                noted.answers[answer] = delta.metrics, delta.finish_reason
            if delta.error is not None:
                raise _given_up(delta.error)
            last_token_at[answer] = now
            yield number, delta


def _given_up(error: str) -> ApiError:
    """What the engine says of a request: its form may be too much for it, all else is the engine's own fault."""
    is_form = error.startswith("structured_outputs")
    return ApiError(400 if is_form else 500, error, param="structured_outputs" if is_form else None)


def abort(state: ServerState, streams: Sequence[ResponseStream]) -> None:
    """Stop the answers that still run."""
    for stream in streams:
        state.metrics.aborted(stream.num_running)
        stream.abort()


async def _merge(streams: Sequence[ResponseStream]) -> AsyncGenerator[tuple[int, Delta], None]:
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    waiting = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                try:
                    delta = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[number]))] = number
                yield number, delta
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def shown_logprob(value: float) -> float:
    """A log probability that JSON can hold."""
    return value if value > _LOWEST_LOGPROB else _LOWEST_LOGPROB  # NaN too becomes the lowest


async def prompt_logprobs_json(entries: list[TokenLogprobs | None] | None) -> list[Any] | None:
    """VLLM's form: for each prompt token a table from token id to log probability; null for the first."""
    return None if entries is None else await shown_in_turns(_table, entries)


def _table(entry: TokenLogprobs | None) -> msgspec.Raw:
    if entry is None:
        return encoded(None)
    table = {str(entry.token_id): _row(entry.logprob, entry.rank, entry.text)}
    for rank, (token, text, _, logprob) in enumerate(entry.top, start=1):
        table.setdefault(str(token), _row(logprob, rank, text))
    return encoded(table)


def _row(logprob: float, rank: int, text: str) -> dict[str, Any]:
    return {"logprob": shown_logprob(logprob), "rank": rank, "decoded_token": text}
