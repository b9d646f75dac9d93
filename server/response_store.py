"""The responses that can be asked for again, or be continued."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

_ENTRY_BYTES = 1024
"""What an entry takes beside its texts."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response and the input that it answers; what came before that is in the responses before it."""

    id: str
    owner: bytes
    """The API key that it was made with; empty where none is asked for."""
    previous: str | None
    """Id of the response that this one continues."""
    input: bytes
    """JSON list of the messages that this one answers."""
    output: bytes
    """Its text in UTF-8."""
    response: bytes
    """JSON object, as the client got it."""

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return _ENTRY_BYTES + len(self.input) + len(self.output) + len(self.response)


_LARGEST_SHARE = 8
"""One response takes an eighth of the room at most, lest it drive out all the others."""


class ResponseStore:
    """Holds so many responses and bytes; the least recently used make room.

    Using a response uses those before it, so that a conversation loses its end before its beginning and what can be
    found can be continued, unless a response before it was deleted.
    """

    def __init__(self, max_responses: int = 1024, max_bytes: int = 256 << 20) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_bytes = 0

    def add(self, entry: StoredResponse) -> None:
        """Keep a response for as long as there is room; one that would take much of it is not kept at all."""
        if entry.num_bytes > self._max_bytes // _LARGEST_SHARE:
            return
        self._entries[entry.id] = entry
        self._num_bytes += entry.num_bytes
        self._use(entry.id)
        while len(self._entries) > self._max_responses or self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def get(self, owner: bytes, name: str) -> StoredResponse:
        """One response.

        Raises:
            KeyError: it is not there, or is another's.
        """
        entry = self._entries[name]
        if entry.owner != owner:
            raise KeyError(name)
        self._use(name)
        return entry

    def conversation(self, owner: bytes, name: str) -> list[StoredResponse]:
        """A response and all before it, the first one first.

        Raises:
            KeyError: one of them is not there, or is another's.
        """
        newest = self.get(owner, name)
        found = list(self._lineage(newest.id))
        if found[-1].previous is not None:
            raise KeyError(found[-1].previous)
        return found[::-1]

    def delete(self, owner: bytes, name: str) -> None:
        """Forget one response; `KeyError` as for `get`."""
        self._drop(self.get(owner, name).id)

    def _lineage(self, name: str | None) -> Iterator[StoredResponse]:
        """A response and those before it, the newest first, as far as they are there."""
        while name is not None and name in self._entries:
            yield self._entries[name]
            name = self._entries[name].previous

    def _use(self, name: str) -> None:
        for entry in self._lineage(name):
            self._entries.move_to_end(entry.id)

    def _drop(self, name: str) -> None:
        self._num_bytes -= self._entries.pop(name).num_bytes
