"""Turns at what few can do at a time, shared fairly: a client that asks for many keeps no other from its own."""

import asyncio
import sys
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from ipaddress import IPv6Address, ip_address
from typing import Any

from starlette.types import Scope

from engine.errors import QueueFullError

CLIENT: ContextVar[tuple[Any, ...]] = ContextVar("client", default=())
"""Who sent the request that is being answered."""


def client_of(scope: Scope) -> tuple[Any, ...]:
    """Key and address of who sent a request. Of an IPv6 address the network, as each client has one of its own."""
    host = (scope.get("client") or ("",))[0]
    try:
        address = ip_address(host)
    except ValueError:
        return scope.get("api_key"), host
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address  # as they come to a listener of both kinds
    return scope.get("api_key"), int(address) >> 64 if isinstance(address, IPv6Address) else int(address)


class Turns:
    """Those who wait get their turns client by client, each client's in order.

    Args:
        at_once: how many have their turn at a time.
        most: that may wait or have their turn. When there are more, whoever has most waiting loses the newest.
    """

    def __init__(self, at_once: int, *, most: int = sys.maxsize) -> None:
        self._at_once = self._free = at_once
        self._most = most
        self._waiting: OrderedDict[tuple[Any, ...], deque[asyncio.Future[None]]] = OrderedDict()
        """By client; the first is next."""

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Around what is done.

        Raises:
            QueueFullError: too many wait.
        """
        if self._free:
            self._free -= 1
        else:
            await self._wait(CLIENT.get())
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, client: tuple[Any, ...]) -> None:
        self._make_room(client)
        mine = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled() and mine.exception() is None:
                self._pass_on()  # it came just now
            else:
                self._leave(client, mine)
            raise

    def _make_room(self, client: tuple[Any, ...]) -> None:
        if self._at_once + sum(map(len, self._waiting.values())) < self._most:
            return
        fullest = max(self._waiting, key=lambda name: len(self._waiting[name]), default=client)
        if len(self._waiting.get(fullest, ())) <= len(self._waiting.get(client, ())) + 1:
            raise QueueFullError
        newest = self._waiting[fullest][-1]
        self._leave(fullest, newest)
        if not newest.done():
            newest.set_exception(QueueFullError())

    def _leave(self, client: tuple[Any, ...], waiting: "asyncio.Future[None]") -> None:
        if waiting in self._waiting.get(client, ()):
            self._waiting[client].remove(waiting)
            if not self._waiting[client]:
                del self._waiting[client]

    def _pass_on(self) -> None:
        while self._waiting:
            client, line = next(iter(self._waiting.items()))
            self._waiting.move_to_end(client)
            mine = line[0]
            self._leave(client, mine)
            if not mine.done():  # who has been cancelled may not have left yet
                mine.set_result(None)
                return
        self._free += 1
