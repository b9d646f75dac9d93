"""What passes between the API process and the engine core: plain data that msgspec can encode."""

from dataclasses import dataclass, field

from engine.sampling_params import SamplingParams


@dataclass(slots=True)
class ImageInput:
    """One image of a prompt, at the place of its placeholder tokens."""

    hash: bytes
    """SHA-256 of contents, shape and preprocessing."""
    offset: int
    """Index of its first placeholder token in the prompt."""
    num_tokens: int
    data: bytes
    """None on its way to the engine process where the request before has it: another answer to the same prompt."""
    shape: tuple[int, ...]
    """uint8 pixels (height, width, 3); float32 pixels (3, height, width); float32 features (tokens, hidden)."""
    kind: str
    """`pixels`: uint8, to be normalized; `tensor`: float32 pixels taken as they are; `features`."""

    @property
    def end(self) -> int:
        """Index behind its last placeholder token."""
        return self.offset + self.num_tokens


@dataclass(slots=True)
class EngineRequest:
    """One sequence to generate."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    """Resolved: never above what fits the context."""
    seed: int
    """Of this sequence's random numbers."""
    eos_token_ids: list[int] = field(default_factory=list)
    images: list[ImageInput] = field(default_factory=list)
    priority: int = 0
    """Lower is served first."""
    arrival_time: float = 0.0
    cache_salt: str = ""
    bad_words: list[list[int]] = field(default_factory=list)
    """Token ids of what must not be said."""
    grammar: str | None = None
    """What the answer must look like, in the words of `engine.grammar`."""


@dataclass(slots=True)
class PositionLogprobs:
    """Log probabilities of one position, best first behind the token taken."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Of the first token in `token_ids`, from 1."""


@dataclass(slots=True)
class EngineOutput:
    """What one step brought for one request."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs] | None = None
    num_cached_tokens: int = 0
    scheduled_time: float = 0.0
    error: str | None = None


@dataclass(slots=True)
class SchedulerStats:
    """The engine core's state after a step, and its counters since it started."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    encoder_seconds: float = 0.0
    encoder_images: int = 0


@dataclass(slots=True)
class EngineOutputs:
    """What one step brought, for all requests."""

    outputs: list[EngineOutput]
    stats: SchedulerStats


@dataclass(slots=True)
class EngineReady:
    """The engine process's first message."""

    max_model_len: int
    """The longest sequence it serves: the model's limit or the cache's size, whichever is less."""
    num_blocks: int
