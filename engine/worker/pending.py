"""What a launched step will bring."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.messages import PositionLogprobs
from engine.step import ModelRunnerOutput
from engine.worker.timer import DeviceTimer


@dataclass(slots=True)
class Logprobs:
    """Log probabilities of some rows, still on the device."""

    taken: Tensor
    """(rows) of the token taken."""
    rank: Tensor
    """(rows) its rank, from 1."""
    top_values: Tensor
    """(rows, k) the highest, best first."""
    top_ids: Tensor
    """(rows, k)."""


@dataclass(slots=True)
class SampledLogprobs:
    """Log probabilities of a step's sampled tokens, of the requests that want them."""

    wanted: list[tuple[str, int]]
    """Request and number, in the order of the rows of `values`."""
    values: Logprobs


@dataclass(slots=True)
class PendingStep:
    """A launched step. Its results are on their way to the host."""

    request_ids: list[str]
    """Of the requests that sample, in the order of `tokens`."""
    tokens: Tensor
    logprobs: SampledLogprobs | None
    prompt_logprobs: list[tuple[str, int, Tensor, Logprobs]]
    """Request, number wanted, target ids, log probabilities."""
    encoding: DeviceTimer | None
    """Of the step's images, if it has any."""
    done: Any
    """CUDA event behind the last copy; None on the CPU."""
    failed: dict[str, str]
    """Requests that cannot go on, each with the reason."""

    def token(self, place: int) -> int:
        """Wait for the step and read one token."""
        if self.done is not None:
            self.done.synchronize()
        return int(self.tokens[place])

    def result(self) -> ModelRunnerOutput:
        """Wait for the step and read what it brought."""
        if self.done is not None:
            self.done.synchronize()
        output = ModelRunnerOutput(dict(zip(self.request_ids, self.tokens.tolist(), strict=True)))
        output.failed = self.failed
        output.encoder_seconds = 0.0 if self.encoding is None else self.encoding.seconds
        if self.logprobs is not None:
            wanted = self.logprobs.wanted
            taken = [output.sampled[request_id] for request_id, _ in wanted]
            rows = _positions(taken, [count for _, count in wanted], self.logprobs.values)
            output.logprobs = {name: row for (name, _), row in zip(wanted, rows, strict=True)}
        for request_id, count, targets, logprobs in self.prompt_logprobs:
            ids = targets.tolist()
            rows = _positions(ids, [count] * len(ids), logprobs)
            output.prompt_logprobs.setdefault(request_id, []).extend(rows)
        return output


def _positions(taken: list[int], counts: list[int], logprobs: Logprobs) -> list[PositionLogprobs]:
    """A position's entry has the token taken first, then the best."""
    values, ranks = logprobs.taken.tolist(), logprobs.rank.tolist()
    top_values, top_ids = logprobs.top_values.tolist(), logprobs.top_ids.tolist()
    return [
        PositionLogprobs([token, *top_ids[i][:count]], [values[i], *top_values[i][:count]], ranks[i])
        for i, (token, count) in enumerate(zip(taken, counts, strict=True))
    ]
