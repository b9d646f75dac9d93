"""Figures from recorded exchanges, against figures worked out by hand."""

import json
from typing import Any

import pytest

from bench.report import Exchange, outcome, remarks, show, spread, summarize


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(**content: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}
DONE = b"data: [DONE]\n\n"


def exchange(*reads: tuple[float, bytes], started: float = 10.0, ended: float = 13.0, status: int = 200) -> Exchange:
    return Exchange(started, ended, status, list(reads))


ROLE = event(**delta(role="assistant", content=""))
GOOD = exchange(
    (10.5, ROLE),
    (11.0, event(**delta(content="a"))),
    (11.5, event(**delta(content="b")) + event(**delta(content="c"))),
    (12.5, event(**delta(content="")) + event(**USAGE) + DONE),
)


def test_times() -> None:
    found = outcome(GOOD)
    assert (found.error, found.prompt_tokens, found.output_tokens) == ("", 7, 4)
    assert found.ttft == pytest.approx(1.0) and found.tpot == pytest.approx(1.5 / 3)
    assert found.e2e == pytest.approx(3.0) and found.gaps == pytest.approx([0.5, 0.0, 1.0])
    assert found.text == "abc"


def test_events_cut_anywhere() -> None:
    whole = b"".join(data for _, data in GOOD.reads)
    for size in (1, 7, 50):
        parts = [(11.0 + i, whole[i : i + size]) for i in range(0, len(whole), size)]
        assert outcome(exchange(*parts)).output_tokens == 4


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (Exchange(failure="ClientError: gone"), "ClientError: gone"),
        (exchange((11.0, b'{"error": {"message": "no"}}'), status=400), 'status 400: {"error": {"message": "no"}}'),
        (exchange((11.0, event(error={"message": "broken"}))), "error in the stream: {'message': 'broken'}"),
        (exchange((11.0, event(**delta(content="a")) + event(**USAGE))), "the stream ended early"),
        (exchange((11.0, event(**delta(content="a")) + DONE)), "the stream ended early"),
        (exchange((11.0, ROLE + event(**USAGE) + DONE)), "the stream ended early"),
    ],
)
def test_errors(given: Exchange, error: str) -> None:
    assert outcome(given).error == error


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (event(**delta(content=5)) + event(**USAGE) + DONE, "TypeError"),
        (b"data: [1]\n", "AttributeError"),
        (event(usage={"prompt_tokens": 1}), "KeyError"),
        (b"data: nothing\n", "JSONDecodeError"),
    ],
)
def test_other_streams(data: bytes, error: str) -> None:
    """Count as errors of their requests, and do not end the run."""
    assert outcome(exchange((11.0, data))).error.startswith(f"the stream is none of a chat: {error}: ")


def test_summary() -> None:
    other = exchange(*((stamp + 1, data) for stamp, data in GOOD.reads), started=11.0, ended=15.0)
    found = summarize([GOOD, other, Exchange(10.0, 10.1, failure="x"), Exchange(10.0, 10.1, failure="x")], 1.0, 3)
    assert (found.requests, found.completed, found.errors, found.wrong_length) == (4, 2, {"x": 2}, 2)
    assert found.duration_s == pytest.approx(5.0) and found.requests_per_s == pytest.approx(0.4)
    assert found.output_tokens_per_s == pytest.approx(1.6) and found.prompt_tokens_per_s == pytest.approx(2.8)
    assert found.ttft_ms is not None and found.ttft_ms.p50 == pytest.approx(1000)
    assert found.client_busy == pytest.approx(0.2)
    assert "2 of 4 completed, 2 errors, 2 of wrong length" in show(found) and "2 times: x" in show(found)
    assert summarize([GOOD], 0.0, None).wrong_length == 0


def test_turns() -> None:
    """Each has figures of its own, or none if all its requests failed; a single one has no others to be told from."""
    later = Exchange(9.0, 13.0, 200, GOOD.reads, turn=1)
    lost = Exchange(13.0, 13.0, failure="x", turn=2)
    found = summarize([GOOD, later, lost], 0.0, None)
    first, second, third = found.turns_ttft_ms
    assert first is not None and first.p50 == pytest.approx(1000)
    assert second is not None and second.p50 == pytest.approx(2000)
    assert third is None and found.errors == {"x": 1}
    assert "  turn 2      2000.00" in show(found) and "turn 3" not in show(found)
    assert summarize([GOOD], 0.0, None).turns_ttft_ms == []


def test_a_busy_client_is_told() -> None:
    assert remarks(summarize([GOOD], 1.0, None)) == []
    assert "the client took a whole core" in show(summarize([GOOD], 2.9, None))


def test_spread() -> None:
    found = spread([0.001 * i for i in range(1, 101)])
    assert found is not None
    assert (found.mean, found.p50, found.p95) == pytest.approx((50.5, 50.5, 95.05))
    assert spread([]) is None
