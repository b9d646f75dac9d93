"""What a request gives back to its caller."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """One token's log probability, natural logarithm, before temperature and penalties."""

    logprob: float
    rank: int
    """1 for the most probable token."""
    decoded_token: str


@dataclass(slots=True)
class TokenLogprobs:
    """The log probabilities of one position: the token taken and its rivals."""

    token_id: int
    text: str
    """What this token adds to the text; these join to the whole text."""
    raw: bytes
    """The token's bytes; these join to the text's UTF-8."""
    logprob: float
    rank: int
    top: list[tuple[int, str, bytes, float]]
    """(id, text, bytes, logprob) of the most probable tokens, best first."""


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` answers; in a stream, all of it so far."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """`stop`, `length`, `abort` or `error`; None while it runs."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end-of-sequence token."""


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of `time.monotonic()`; 0 where it has not happened."""

    arrival_time: float = 0.0
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0


@dataclass(slots=True)
class RequestOutput:
    """A finished request, as `LLM.generate` returns it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class Delta:
    """What came new for one answer: the unit of a stream. Deltas of one answer can be merged."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    """Why the engine gave this request up, with `finish_reason` `error`."""
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """With the first delta, when asked for: an entry a prompt token, None for the first."""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    def merge(self, newer: "Delta") -> None:
        """Append a newer delta, for a reader that is slower than the engine."""
        self.text += newer.text
        self.token_ids += newer.token_ids
        self.logprobs += newer.logprobs
        self.finish_reason = newer.finish_reason
        self.stop_reason = newer.stop_reason
        self.error = newer.error
        self.metrics = newer.metrics
        self.prompt_logprobs = self.prompt_logprobs or newer.prompt_logprobs
