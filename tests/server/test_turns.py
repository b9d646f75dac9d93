"""Turns are shared fairly."""

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import QueueFullError
from server.turns import CLIENT, Turns, client_of


class House:
    """Where clients take turns, and what becomes of each."""

    def __init__(self, most: int, at_once: int = 1) -> None:
        self.at_once = at_once
        self.turns = Turns(at_once, most=most)
        self.served: list[tuple[str, int]] = []
        self.refused: list[tuple[str, int]] = []
        self.inside = 0
        self.door = asyncio.Event()
        """Open: whoever has a turn ends it."""

    def ask(self, client: str, number: int) -> "asyncio.Task[None]":
        async def come() -> None:
            CLIENT.set((client,))
            try:
                async with self.turns.turn():
                    self.inside += 1
                    assert self.inside <= self.at_once
                    self.served.append((client, number))
                    try:
                        await self.door.wait()
                    finally:
                        self.inside -= 1
            except QueueFullError:
                self.refused.append((client, number))

        return asyncio.create_task(come())


async def test_client_by_client_and_each_in_order() -> None:
    house = House(most=10)
    tasks = [house.ask(client, number) for number, client in enumerate("aaaabbc")]
    await asyncio.sleep(0)
    house.door.set()
    await asyncio.gather(*tasks)
    assert house.served == [("a", 0), ("a", 1), ("b", 4), ("c", 6), ("a", 2), ("b", 5), ("a", 3)]
    assert not house.refused and not house.turns._waiting


async def test_who_fills_the_room_makes_room_for_others() -> None:
    house = House(most=6)
    greedy = [house.ask("greedy", number) for number in range(10)]
    await asyncio.sleep(0)
    assert house.refused == [("greedy", number) for number in range(6, 10)]
    for number, name in enumerate("xyx"):
        greedy.append(house.ask(name, number))
        await asyncio.sleep(0)
    greedy.append(house.ask("x", 3))  # has two already, as greedy
    for _ in range(2):
        await asyncio.sleep(0)
    lost = [("greedy", number) for number in (5, 4, 3)]  # the newest
    assert sorted(house.refused[4:]) == sorted([*lost, ("x", 3)])
    house.door.set()
    await asyncio.gather(*greedy)
    assert house.served == [("greedy", 0), ("greedy", 1), ("x", 0), ("y", 1), ("greedy", 2), ("x", 2)]


async def test_a_turn_that_comes_to_one_who_just_left_goes_on() -> None:
    house = House(most=5)
    first, leaving, last = (house.ask(name, 0) for name in "abc")
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)  # its turn has been passed on, and not yet been taken
    leaving.cancel()
    house.door.set()
    await asyncio.wait_for(last, 1)
    assert house.served == [("a", 0), ("c", 0)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3))
def test_whatever_happens_turns_go_round(seed: int, most: int, at_once: int) -> None:
    async def play() -> None:
        chance, house = random.Random(seed), House(most, at_once)
        house.door.set()
        tasks = []
        for number in range(40):
            tasks.append(house.ask(chance.choice("abc"), number))
            if chance.random() < 0.2:
                chance.choice(tasks).cancel()
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            assert at_once + sum(map(len, house.turns._waiting.values())) <= max(most, at_once)
        ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        left = sum(isinstance(one, asyncio.CancelledError) for one in ended)
        assert not any(isinstance(one, Exception) for one in ended)
        assert len(house.served) + len(house.refused) + left >= 40
        assert Counter(house.served + house.refused).most_common(1)[0][1] == 1
        assert not house.turns._waiting and house.turns._free == at_once
        for name in "abc":
            own = [number for client, number in house.served if client == name]
            assert own == sorted(own)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        (("10.0.0.1", 1), ("10.0.0.1", 2), True),
        (("10.0.0.1", 1), ("10.0.0.2", 1), False),
        (("2001:db8::1", 1), ("2001:db8::ffff:1", 1), True),
        (("2001:db8::1", 1), ("2001:db8:0:1::1", 1), False),
        (("::ffff:10.0.0.1", 1), ("10.0.0.1", 2), True),
        (("::ffff:10.0.0.1", 1), ("::ffff:10.0.0.2", 1), False),
        (None, None, True),  # over a Unix socket
    ],
)
def test_who_is_one_client(one: Any, other: Any, are_same: bool) -> None:
    assert (client_of({"client": one}) == client_of({"client": other})) is are_same
    assert client_of({"client": one, "api_key": b"a"}) != client_of({"client": one, "api_key": b"b"})
