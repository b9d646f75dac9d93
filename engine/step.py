"""What the scheduler tells the worker to do in one step, and what the worker answers."""

from dataclasses import dataclass, field

from llguidance import LLMatcher

from engine.messages import EngineRequest, ImageInput, PositionLogprobs


@dataclass(slots=True)
class NewRequest:
    """A request that starts, or starts again after preemption: all that the worker needs of it."""

    request: EngineRequest
    token_ids: list[int]
    """The prompt and what was generated before preemption."""
    block_ids: list[int]
    matcher: LLMatcher | None = None
    """Of what the answer must look like, at its beginning."""


@dataclass(slots=True)
class ScheduledRequest:
    """One request's part of the step: tokens [start, start + num_tokens)."""

    request_id: str
    start: int
    num_tokens: int
    samples: bool
    """Whether these tokens reach the end of what is known, so that a token is sampled."""
    new_block_ids: list[int]
    """Appended to its block table, after those it was started with."""
    num_output_tokens: int
    """Tokens generated before this step, those still in flight counted in."""


@dataclass(slots=True)
class SchedulerOutput:
    """One step: removals first, then arrivals, then images, then the tokens."""

    finished_ids: list[str] = field(default_factory=list)
    """Ended, aborted or preempted since the last step: their slots are free."""
    new_requests: list[NewRequest] = field(default_factory=list)
    requests: list[ScheduledRequest] = field(default_factory=list)
    owners: list[object] = field(default_factory=list)
    """The scheduler's own record of each of these: a name may belong to another request once a step is over."""
    freed_images: list[bytes] = field(default_factory=list)
    """Hashes whose features leave the encoder cache."""
    encode_images: list[ImageInput] = field(default_factory=list)
    """To be encoded in this step, before the language model runs."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the language model processes in this step."""
        return sum(request.num_tokens for request in self.requests)


@dataclass(slots=True)
class ModelRunnerOutput:
    """One step's results, by request id."""

    sampled: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, PositionLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[PositionLogprobs]] = field(default_factory=dict)
    """Of the positions this step computed; entry i tells of the token at start + i + 1."""
    failed: dict[str, str] = field(default_factory=dict)
    """Requests that cannot go on, each with the reason."""
    encoder_seconds: float = 0.0
    """What the device spent on the step's images."""
