"""How conversations are spread over time, on a server of known behaviour."""

import json
from typing import Any

import pytest

from bench.load import Load
from bench.serve import Pace, ServeSettings, measure, warm_up
from tests.bench.fake import Fake

TEXT = Load(sizes=(None,), prompt_words=3)


async def test_conversations() -> None:
    """So many are going on at once; each turn holds the answers before it, and is timed for itself."""
    fake = Fake(wait_s=0.03)
    settings = ServeSettings(TEXT, requests=6, turns=3, max_tokens=9)
    async with fake.target() as target:
        found = await measure(target, settings, Pace(3))
    assert (found.requests, found.completed, found.errors, fake.most_at_once) == (18, 18, {}, 3)
    turns = [spread.p50 for spread in found.turns_ttft_ms if spread is not None]
    assert len(turns) == 3 and all(wait > least for wait, least in zip(turns, (30, 60, 90), strict=True))
    assert turns == sorted(turns)
    by_first = dict[str, list[list[Any]]]()
    for body in fake.asked:
        assert (body["model"], body["max_tokens"], body["stream"]) == ("first", 9, True)
        by_first.setdefault(json.dumps(body["messages"][0]), []).append(body["messages"])
    assert len(by_first) == 6
    answers = {f"answer {number}": body["messages"] for number, body in enumerate(fake.asked, start=1)}
    for first, second, third in by_first.values():
        assert (len(first), second[:1], third[:3]) == (1, first, second)
        assert second[1]["role"] == third[3]["role"] == "assistant"
        assert answers[second[1]["content"]] == first and answers[third[3]["content"]] == second


async def test_a_conversation_that_fails() -> None:
    """What can no longer be asked is counted with the errors."""
    settings = ServeSettings(TEXT, requests=4, turns=3)
    async with Fake(fail_in_turn=1).target() as target:
        found = await measure(target, settings, Pace(2))
        with pytest.raises(RuntimeError, match="the warm-up failed: status 500: broken"):
            await warm_up(target, settings, 2)
    assert (found.requests, found.completed) == (12, 4)
    assert found.errors == {"status 500: broken": 4, "not asked: an earlier turn failed": 4}
    assert found.turns_ttft_ms[0] is not None and found.turns_ttft_ms[1:] == [None, None]


async def test_rate_waits_for_no_answer() -> None:
    """All have come before the first is answered; the time that passes is that of the arrivals."""
    fake = Fake(wait_s=1.0)
    async with fake.target() as target:
        found = await measure(target, ServeSettings(TEXT, requests=8), Pace(rate=40.0))
        assert fake.most_at_once == 8
        fake.wait_s = 0.0
        slow = await measure(target, ServeSettings(TEXT, requests=8), Pace(rate=8.0))
    assert found.completed == slow.completed == 8
    assert slow.duration_s > 2 * (found.duration_s - 1.0) > 0


async def test_fields() -> None:
    fake = Fake()
    async with fake.target() as target:
        found = await measure(target, ServeSettings(TEXT, requests=1, max_tokens=3, ignore_eos=True), Pace(1))
        await measure(target, ServeSettings(TEXT, requests=1, schema={"type": "object"}), Pace(1))
    assert found.wrong_length == 1  # two tokens came
    plain, formed = fake.asked
    assert plain["ignore_eos"] is True and plain["min_tokens"] == 3 and "response_format" not in plain
    assert formed["response_format"]["json_schema"]["schema"] == {"type": "object"} and "ignore_eos" not in formed


def test_names_of_paces() -> None:
    assert [str(pace) for pace in (Pace(8), Pace(rate=0.5), Pace(rate=12.0))] == ["8 at once", "0.5/s", "12/s"]
