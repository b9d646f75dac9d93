"""The responses that can be asked for again, or be continued."""

from collections import OrderedDict, defaultdict
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


class _Shelf:
    """One owner's responses, the least recently used first."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def add(self, entry: StoredResponse) -> None:
        self.entries[entry.id] = entry
        self.num_bytes += entry.num_bytes

    def use(self, name: str) -> None:
        for entry in self.lineage(name):
            self.entries.move_to_end(entry.id)

    def lineage(self, name: str | None) -> Iterator[StoredResponse]:
        """A response and those before it, the newest first, as far as they are there."""
        while name is not None and name in self.entries:
            yield self.entries[name]
            name = self.entries[name].previous

    def drop(self, name: str) -> None:
        self.num_bytes -= self.entries.pop(name).num_bytes


class ResponseStore:
    """Holds so many responses and bytes. Whose responses take most of the room makes room, with the least recently used
    of them, so that nobody can drive out another's.

    Using a response uses those before it, so that a conversation loses its end before its beginning and what can be
    found can be continued, unless a response before it was deleted.
    """

    def __init__(self, max_responses: int = 1024, max_bytes: int = 256 << 20) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._shelves: defaultdict[bytes, _Shelf] = defaultdict(_Shelf)
        """By owner, of whom there are no more than API keys."""

    def add(self, entry: StoredResponse) -> None:
        """Keep a response for as long as there is room; one that would take much of it is not kept at all."""
        if entry.num_bytes > self._max_bytes // _LARGEST_SHARE:
            return
        self._shelves[entry.owner].add(entry)
        self._shelves[entry.owner].use(entry.id)
        while self._excess() > 1:
            fullest = max(self._shelves.values(), key=self._share)
            fullest.drop(next(iter(fullest.entries)))

    def get(self, owner: bytes, name: str) -> StoredResponse:
        """One response.

        Raises:
            KeyError: it is not there, or is another's.
        """
        shelf = self._shelves[owner]
        entry = shelf.entries[name]
        shelf.use(name)
        return entry

    def conversation(self, owner: bytes, name: str) -> list[StoredResponse]:
        """A response and all before it, the first one first.

        Raises:
            KeyError: one of them is not there, or is another's.
        """
        self.get(owner, name)
        found = list(self._shelves[owner].lineage(name))
        if found[-1].previous is not None:
            raise KeyError(found[-1].previous)
        return found[::-1]

    def delete(self, owner: bytes, name: str) -> None:
        """Forget one response; `KeyError` as for `get`."""
        self._shelves[owner].drop(name)

    def _share(self, shelf: _Shelf) -> float:
        """The part of the room that it takes, by number or bytes, whichever is more."""
        return max(len(shelf.entries) / self._max_responses, shelf.num_bytes / self._max_bytes)

    def _excess(self) -> float:
        number = sum(len(shelf.entries) for shelf in self._shelves.values())
        num_bytes = sum(shelf.num_bytes for shelf in self._shelves.values())
        return max(number / self._max_responses, num_bytes / self._max_bytes)
