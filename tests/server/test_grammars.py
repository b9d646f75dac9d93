"""Grammars that clients bring are checked where no harm can come of them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.errors import QueueFullError
from engine.grammar.structured_outputs import StructuredOutputs
from server import grammars
from server.grammars import GrammarChecker
from server.turns import CLIENT
from tests.engine.grammar.accepting import VOCAB, tokenizer_json
from tests.random_tokenizer import EOS_ID

LOOP = {"type": "integer", "multipleOf": 99_999_989}
GOOD = {"type": "object"}


def source(schema: Any) -> str:
    return StructuredOutputs(json=schema).source()


@pytest.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(tokenizer_json(), VOCAB, [EOS_ID])
    yield made
    made.kill()


async def test_good_ones_are_asked_about_once(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "_REMEMBERED", 2)
    asked: list[str] = []
    run = checker._worker.run

    async def count(text: str) -> Any:
        asked.append(text)
        return await run(text)

    monkeypatch.setattr(checker._worker, "run", count)
    schemas = [source({"const": number}) for number in range(3)]
    for number in (0, 1, 0, 2, 0, 1):  # 2 drives out 1, the one longest unused
        await checker.check(schemas[number])
    assert [schemas.index(text) for text in asked] == [0, 1, 2, 1]
    assert len(checker._found) == 2


async def test_bad_ones_are_told_each_time_and_asked_about_once(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match='Unimplemented keys: \\["not"\\]'):
            await checker.check(source({"not": {}}))
        monkeypatch.setattr(checker, "_worker", None)
    monkeypatch.undo()
    await checker.check(source(GOOD))


async def test_what_takes_for_ever_is_ended(checker: GrammarChecker) -> None:
    await checker.check(source(GOOD))
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    begun = time.monotonic()
    with pytest.raises(ValueError, match="it takes more than 2 s to compile"):
        await checker.check(source(LOOP))
    assert time.monotonic() - begun < 5
    ticking.cancel()
    assert ticks > 50, "the event loop stood still"
    await checker.check(source({"type": "array"}))


async def test_what_kills_the_process(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    async def die(_: str) -> None:
        raise EOFError

    monkeypatch.setattr(checker._worker, "run", die)
    for _ in range(2):  # not remembered: it may have been what came before
        with pytest.raises(ValueError, match="too much memory to compile, or is nested too deep"):
            await checker.check(source(GOOD))
    monkeypatch.undo()
    await checker.check(source(GOOD))


async def test_no_more_wait_than_may(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker._worker._turns, "_most", 2)
    results = await asyncio.gather(*(checker.check(source({"const": i})) for i in range(5)), return_exceptions=True)
    assert [type(result) for result in results].count(QueueFullError) == 3
    await checker.check(source({"const": 9}))
    assert not checker._checking


async def test_many_that_ask_for_the_same_wait_for_one_check(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker._worker._turns, "_most", 1)
    await asyncio.gather(*(checker.check(source(GOOD)) for _ in range(100)))


async def test_what_nobody_waits_for_holds_up_nobody(checker: GrammarChecker) -> None:
    """Ten clients bring what takes the compiler very long, and leave."""
    await checker.check(source(GOOD))  # the process has begun
    leaving = [
        asyncio.create_task(checker.check(source({**LOOP, "multipleOf": 99_999_989 - 2 * number})))
        for number in range(10)
    ]
    await asyncio.sleep(0.05)
    begun = time.monotonic()
    for task in leaving:
        task.cancel()
    await checker.check(source({"const": "new"}))
    assert time.monotonic() - begun < 10  # of which a new process takes some
    assert not checker._checking and not checker._num_waiting


async def test_who_leaves_takes_nothing_from_who_waits_for_the_same(checker: GrammarChecker) -> None:
    first, second = (asyncio.create_task(checker.check(source(GOOD))) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert first.cancelled()


async def test_nobody_waits_in_the_line_of_another(checker: GrammarChecker) -> None:
    """Who asks for the same grammar as a client that waits behind many of its own."""
    await checker.check(source(GOOD))  # the process has begun
    done: list[str] = []

    async def ask(client: str, name: str, schema: Any) -> None:
        CLIENT.set((client,))
        with contextlib.suppress(ValueError):
            await checker.check(source(schema))
        done.append(f"{client} {name}")

    slow = [asyncio.create_task(ask("many", "slow", {**LOOP, "minimum": number})) for number in range(3)]
    last = asyncio.create_task(ask("many", "common", {"const": "common"}))
    await asyncio.sleep(0.01)
    await ask("one", "common", {"const": "common"})
    assert done.count("many slow") <= 2
    for task in (*slow, last):
        task.cancel()
    await asyncio.gather(*slow, last, return_exceptions=True)
    assert not checker._checking and not checker._num_waiting
