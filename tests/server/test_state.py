"""What requests hold of the server's memory."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from server.errors import ApiError
from server.room import Room
from server.sse import unless_client_goes
from server.state import HeldBody, ServerState, read_body
from server.tokenization import _TokenizeRequest
from server.turns import client_of


class Large:
    """What should be gone as soon as nobody needs it."""


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def test_images_that_are_refused_are_gone_at_once() -> None:
    """Not when Python next looks for cycles, which may be gigabytes later."""
    seen: list[weakref.ref[Large]] = []

    async def fetch(_: str) -> Large:
        large = Large()
        seen.append(weakref.ref(large))
        return large

    async def prepare(data: Large, cache_salt: str | None) -> None:
        await asyncio.sleep(0)
        raise ValueError("damaged")

    state: Any = SimpleNamespace(
        inputs=SimpleNamespace(check_image_count=lambda count: None),
        config=SimpleNamespace(vision=None),
        images=SimpleNamespace(prepare=prepare),
        media=SimpleNamespace(fetch=fetch),
    )
    with pytest.raises(ValueError, match="damaged"):
        await ServerState.load_images(state, ["one", "two"])
    await asyncio.sleep(0)
    assert [one() for one in seen] == [None, None]


async def test_what_a_request_had_in_hand_when_it_failed_is_gone_at_once() -> None:
    seen: list[weakref.ref[Large]] = []

    async def work() -> None:
        large = Large()
        seen.append(weakref.ref(large))
        await asyncio.sleep(0)
        raise ValueError("wrong")

    request: Any = SimpleNamespace(receive=asyncio.Event().wait)
    with pytest.raises(ValueError, match="wrong"):
        await unless_client_goes(request, work())
    await asyncio.sleep(0)
    assert seen[0]() is None


class Body:
    """A request whose body comes in two pieces."""

    def __init__(self, state: Any, client: str, size: int) -> None:
        self.scope: dict[str, Any] = {"client": (client, 1)}
        self.scope["held_body"] = HeldBody(state, client_of(self.scope))
        self.headers: dict[str, str] = {}
        self.app = SimpleNamespace(state=SimpleNamespace(server=state))
        self._half = size // 2

    async def stream(self) -> AsyncIterator[bytes]:
        yield b'{"prompt": "' + b"x" * (self._half - 12)
        yield b"x" * (self._half - 2) + b'"}'

    async def read(self) -> None:
        await read_body(self, _TokenizeRequest)  # type: ignore[arg-type]


async def test_bodies_are_counted_until_they_are_let_go() -> None:
    """Sixteen of the largest size; who brought them is told to come again, and others are served."""
    engine, args = SimpleNamespace(inputs=SimpleNamespace(max_model_len=100)), SimpleNamespace(max_request_bytes=1000)
    state: Any = ServerState(engine, args, *[None] * 9)  # type: ignore[arg-type]
    bodies = [Body(state, "10.0.0.1", 1000) for _ in range(17)]
    for body in bodies:
        await body.read()
    assert (state.coming.taken, state.held.taken) == (0, 17_000)
    late = Body(state, "10.0.0.1", 100)
    with pytest.raises(ApiError) as refused:
        await late.read()
    assert refused.value.status == 503
    other = Body(state, "10.0.0.2", 1000)
    await other.read()
    for body in [*bodies, other]:
        for _ in range(2):
            body.scope["held_body"].let_go()
    await late.read()
    assert (state.coming.taken, state.held.taken) == (0, 100)


def test_a_room_that_is_full() -> None:
    """Is full for who has taken more than an equal share, and in the end for all."""
    room = Room(100)
    for client, size in (("much", 90), ("some", 20), ("little", 5)):
        room.take(client, size)
    assert [room.is_full_for(client) for client in ("much", "some", "little", "none")] == [True, False, False, False]
    room.give_back("much", 90)
    assert not room.is_full_for("some")
    room.take("much", 400)
    assert room.is_full_for("none")
