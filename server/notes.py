"""What comes to be known of a request while it is answered, for whoever tells of it at its end.

Nobody writes anything down unless somebody asked for it by putting `Notes` into `NOTES`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from engine.outputs import RequestMetrics
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from server.generation import Usage


class Stage(NamedTuple):
    """A piece of work before the engine's. Times are of `time.monotonic()`."""

    name: str
    began: float
    ended: float
    is_done: bool
    """False where it failed or was given up."""


@dataclass(slots=True)
class Notes:
    """Of one HTTP request. Nothing of what was asked or answered, but numbers."""

    name: str = ""
    """Of the request in the engine; empty for one that did not get there, as are the next three."""
    model: str = ""
    params: SamplingParams | None = None
    usage: "Usage | None" = None
    """Counts on while the answers come."""
    answers: dict[tuple[int, int], tuple[RequestMetrics, str | None]] = field(default_factory=dict)
    """Times and finish reason of each, by the numbers of prompt and answer."""
    stages: list[Stage] = field(default_factory=list)
    failure: int = 0
    """Status that the client was told, in the middle of a stream too; 0 where nothing failed."""


NOTES: ContextVar[Notes | None] = ContextVar("notes", default=None)


def current() -> Notes | None:
    """The notes of the request that is being answered, if anybody wants them."""
    return NOTES.get()


def failed(status: int) -> None:
    """The client is told of an error."""
    notes = current()
    if notes is not None:
        notes.failure = status


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Around a piece of work."""
    notes = current()
    if notes is None:
        yield
        return
    began, is_done = time.monotonic(), False
    try:
        yield
        is_done = True
    finally:
        notes.stages.append(Stage(name, began, time.monotonic(), is_done))
