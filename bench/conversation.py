"""The requests of one conversation, as the bytes that are sent."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from bench.load import Load, message

_END = b"]}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """All that is known of it before the first answer."""

    first: bytes
    """The body of the first request."""
    questions: tuple[bytes, ...] = ()
    """The user's messages of later turns."""

    @property
    def turns(self) -> int:
        """How many requests it has."""
        return 1 + len(self.questions)


def conversations(fields: dict[str, Any], load: Load, part: int, *, count: int, turns: int) -> list[Conversation]:
    """So many, whose requests have `fields` beside their messages."""

    def build(index: int) -> Conversation:
        # The messages come last, so that more of them are added without writing the pictures again.
        first = json.dumps({**fields, "messages": [message(load, part, index)]}).encode()
        later = (json.dumps(message(load, part, index, turn)).encode() for turn in range(1, turns))
        return Conversation(first, tuple(later))

    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(build, range(count)), total=count, desc="Building requests", disable=None))


def follow_up(body: bytes, answer: str, question: bytes) -> bytes:
    """The body of the request after the one with `body`, which got `answer`."""
    answered = json.dumps({"role": "assistant", "content": answer}).encode()
    return b"%b, %b, %b%b" % (body.removesuffix(_END), answered, question, _END)
