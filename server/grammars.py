"""Checks the grammars that clients bring where no harm can come of it: some take the compiler very long, or kill it."""

import asyncio
import hashlib
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from engine.grammar.compiler import GrammarCompiler
from server.killable import KillableWorker
from server.turns import CLIENT

_SECONDS = 2.0
_REMEMBERED = 4096
_TIMEOUT_REMEMBERED_SECONDS = 60.0
"""The machine may have been busy."""
_MOST_WAITING = 64
"""Grammars that are checked one after the other, before those that come are told to come again."""


_Check = tuple[tuple[Any, ...], bytes]
"""Whose, and of which grammar: not the same for all who ask for it, lest one wait in the line of another."""


class GrammarChecker:
    """Remembers what it found of the newest; arguments as of `GrammarCompiler`, but the tokenizer's JSON itself."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._worker = KillableWorker(
            make_checker, tokenizer, vocab_size, eos_token_ids, seconds=_SECONDS, most=_MOST_WAITING
        )
        self._found: OrderedDict[bytes, tuple[str | None, float]] = OrderedDict()
        """What is wrong with a grammar, None for nothing, and until when that holds."""
        self._checking: dict[_Check, asyncio.Task[tuple[str | None, float]]] = {}
        """Those that are being checked: a client that asks for the same waits for the same."""
        self._num_waiting: Counter[_Check] = Counter()

    async def check(self, source: str) -> None:
        """Compile a grammar.

        Raises:
            ValueError: it is wrong, asks for what cannot be enforced, or is too much work.
            QueueFullError: too many wait to be checked.
        """
        digest = hashlib.sha256(source.encode()).digest()
        wrong, until = self._found.get(digest, (None, 0.0))
        if time.monotonic() >= until:
            check = CLIENT.get(), digest
            if check not in self._checking:
                self._checking[check] = asyncio.create_task(self._in_turn(source))
                self._checking[check].add_done_callback(lambda task: self._checked(check, task))
            wrong, seconds = await self._result(check)
            self._found[digest] = wrong, time.monotonic() + seconds
        self._found.move_to_end(digest)
        if len(self._found) > _REMEMBERED:
            self._found.popitem(last=False)
        if wrong is not None:
            raise ValueError(wrong)

    async def _result(self, check: _Check) -> tuple[str | None, float]:
        """Of a check that is under way. It ends when the last who waits for it leaves, and the next gets its turn."""
        self._num_waiting[check] += 1
        try:
            return await asyncio.shield(self._checking[check])
        except asyncio.CancelledError:
            if self._num_waiting[check] == 1 and check in self._checking:
                self._checking.pop(check).cancel()
            raise
        finally:
            self._num_waiting[check] -= 1
            if not self._num_waiting[check]:
                del self._num_waiting[check]

    def _checked(self, check: _Check, task: asyncio.Task[tuple[str | None, float]]) -> None:
        if self._checking.get(check) is task:
            del self._checking[check]
        task.cancelled() or task.exception()  # which is thereby taken note of, should nobody wait for it any more

    async def _in_turn(self, source: str) -> tuple[str | None, float]:
        """What is wrong, and for how many seconds that is to be remembered; raises what `check` does."""
        try:
            await self._worker.run(source)
        except TimeoutError:
            return f"it takes more than {_SECONDS:g} s to compile", _TIMEOUT_REMEMBERED_SECONDS
        except EOFError:
            return "it takes too much memory to compile, or is nested too deep", 0.0
        except ValueError as error:
            return str(error), math.inf
        return None, math.inf

    def kill(self) -> None:
        """End the process, if there is one."""
        self._worker.kill()


def make_checker(tokenizer: str, vocab_size: int, eos_token_ids: list[int]) -> Callable[[str], None]:
    """The work of the process that compiles grammars first."""
    compiler = GrammarCompiler(lambda: tokenizer, vocab_size, eos_token_ids)

    def check(source: str) -> None:
        compiler.matcher(source)

    check('{"grammars": [{"lark_grammar": "start: /a/"}]}')  # reads the tokenizer, which is no client's time
    return check
