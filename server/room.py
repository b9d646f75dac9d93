"""Memory that clients share: one that takes much of it keeps no other from a little."""

from collections import Counter
from typing import Any

_UTMOST = 4
"""Times what there is room for, above which nobody gets any more."""


class Room:
    """Counts what clients have taken.

    Args:
        most: bytes for all together. Beyond, only who has less than an equal share gets more.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[Any] = Counter()

    @property
    def taken(self) -> int:
        """By all together."""
        return self._taken.total()

    def take(self, client: Any, size: int) -> None:
        """Count bytes; whether there is room for them is asked afterwards."""
        self._taken[client] += size

    def give_back(self, client: Any, size: int) -> None:
        """Count them no more."""
        self._taken[client] -= size
        if not self._taken[client]:
            del self._taken[client]

    def is_full_for(self, client: Any) -> bool:
        """Whether a client has taken more than there is for it."""
        if self.taken <= self._most:
            return False
        return self.taken > _UTMOST * self._most or self._taken[client] * len(self._taken) >= self.taken
