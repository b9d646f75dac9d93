"""From what came over the wire, and when, to figures."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class Exchange:
    """One request and its answer as the client saw them; seconds of one clock."""

    started: float = 0.0
    ended: float = 0.0
    status: int = 0
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    """When bytes arrived, and which."""
    failure: str = ""
    turn: int = 0
    """Of its conversation."""


@dataclass(slots=True)
class Outcome:
    """One request's figures, in seconds, or its error."""

    error: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: float = 0.0
    """From sending to the first text."""
    tpot: float = 0.0
    """From the first text to the last, for each token but one; 0 for a single token."""
    e2e: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between one piece of text and the next."""
    turn: int = 0
    text: str = ""


@dataclass(slots=True)
class Spread:
    """Milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(slots=True)
class Summary:
    """A run's figures."""

    requests: int
    completed: int
    errors: dict[str, int]
    wrong_length: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    client_busy: float
    """Share of a core that the client took: near 1 it is the client that is measured."""
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    turns_ttft_ms: list[Spread | None]
    """Of each turn, where conversations have several."""


def outcome(exchange: Exchange) -> Outcome:
    """Read one exchange."""
    try:
        found = _read(exchange)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        found = Outcome(error=f"the stream is none of a chat: {type(error).__name__}: {error}"[:200])
    found.turn = exchange.turn
    return found


def _read(exchange: Exchange) -> Outcome:
    if exchange.failure:
        return Outcome(error=exchange.failure)
    if exchange.status != 200:
        body = b"".join(data for _, data in exchange.reads)[:200].decode(errors="replace")
        return Outcome(error=f"status {exchange.status}: {body}")
    found, stamps, ended = Outcome(e2e=exchange.ended - exchange.started), list[float](), False
    pieces: list[str] = []
    for stamp, data in _events(exchange.reads):
        if data == b"[DONE]":
            ended = True
            continue
        chunk = json.loads(data)
        if chunk.get("error"):
            return Outcome(error=f"error in the stream: {chunk['error']}"[:200])
        usage = chunk.get("usage")
        if usage:
            found.prompt_tokens, found.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        texts = [
            text for choice in chunk.get("choices") or () if (text := _text(choice.get("delta") or {})) is not None
        ]
        if texts:
            stamps.append(stamp)
            pieces += texts
    if not ended or not stamps or not found.output_tokens:
        return Outcome(error="the stream ended early")
    found.ttft = stamps[0] - exchange.started
    found.tpot = (stamps[-1] - stamps[0]) / (found.output_tokens - 1) if found.output_tokens > 1 else 0.0
    found.gaps = np.diff(stamps).tolist()
    found.text = "".join(pieces)
    return found


def _text(delta: dict[str, Any]) -> str | None:
    """None where there is none; the empty text beside the role is none."""
    content: str | None = delta.get("content")
    return None if content == "" and "role" in delta else content


def _events(reads: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    rest = b""
    for stamp, data in reads:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield stamp, line[5:].strip()


def summarize(exchanges: Sequence[Exchange], cpu_seconds: float, wanted_tokens: int | None) -> Summary:
    """All requests together; `wanted_tokens` is the length that answers must have, if they must."""
    outcomes = [outcome(exchange) for exchange in exchanges]
    good = [one for one in outcomes if not one.error]
    duration = max(e.ended for e in exchanges) - min(e.started for e in exchanges)
    return Summary(
        requests=len(outcomes),
        completed=len(good),
        errors=dict(Counter(one.error for one in outcomes if one.error)),
        wrong_length=sum(wanted_tokens not in (None, one.output_tokens) for one in good),
        duration_s=duration,
        requests_per_s=len(good) / duration,
        output_tokens_per_s=sum(one.output_tokens for one in good) / duration,
        prompt_tokens_per_s=sum(one.prompt_tokens for one in good) / duration,
        client_busy=cpu_seconds / duration,
        ttft_ms=spread([one.ttft for one in good]),
        tpot_ms=spread([one.tpot for one in good if one.output_tokens > 1]),
        itl_ms=spread([gap for one in good for gap in one.gaps]),
        e2e_ms=spread([one.e2e for one in good]),
        turns_ttft_ms=_of_turns(outcomes),
    )


def _of_turns(outcomes: list[Outcome]) -> list[Spread | None]:
    turns = 1 + max(one.turn for one in outcomes)
    if turns == 1:
        return []
    return [spread([one.ttft for one in outcomes if not one.error and one.turn == turn]) for turn in range(turns)]


def spread(seconds: Sequence[float]) -> Spread | None:
    """Mean and percentiles; None of nothing."""
    if not seconds:
        return None
    values = np.asarray(seconds) * 1000
    return Spread(float(values.mean()), *(float(np.percentile(values, percent)) for percent in (50, 95, 99)))


def table(rows: dict[str, Spread | None]) -> str:
    """Spreads as lines."""
    lines = [f"{'ms':10}{'mean':>11}{'p50':>11}{'p95':>11}{'p99':>11}"]
    lines += [
        f"{name:10}{row.mean:11.2f}{row.p50:11.2f}{row.p95:11.2f}{row.p99:11.2f}" for name, row in rows.items() if row
    ]
    return "\n".join(lines)


def show(summary: Summary) -> str:
    """A summary for people."""
    turns = {f"  turn {turn}": found for turn, found in enumerate(summary.turns_ttft_ms, start=1)}
    rest = {"tpot": summary.tpot_ms, "itl": summary.itl_ms, "e2e": summary.e2e_ms}
    lines = [
        f"{summary.completed} of {summary.requests} completed, {sum(summary.errors.values())} errors, "
        f"{summary.wrong_length} of wrong length, {summary.duration_s:.2f} s, client busy {summary.client_busy:.0%}",
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.1f} output tokens/s, "
        f"{summary.prompt_tokens_per_s:.1f} prompt tokens/s",
        table({"ttft": summary.ttft_ms, **turns, **rest}),
        *remarks(summary),
    ]
    return "\n".join(lines)


def remarks(summary: Summary) -> list[str]:
    """What makes a run's figures doubtful."""
    lines = [f"{count} times: {error}" for error, count in summary.errors.items()]
    if summary.client_busy > 0.9:
        lines.append("warning: the client took a whole core, so that its own speed was measured")
    return lines
