"""Checks the grammars that clients bring where no harm can come of it: some take the compiler very long, or kill it."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable

from engine.grammar.compiler import GrammarCompiler
from server.killable import KillableWorker

_SECONDS = 2.0
_REMEMBERED = 4096


class GrammarChecker:
    """Remembers the newest that were good; arguments as of `GrammarCompiler`, but the tokenizer's JSON itself."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._worker = KillableWorker(make_checker, tokenizer, vocab_size, eos_token_ids, seconds=_SECONDS)
        self._good: OrderedDict[bytes, None] = OrderedDict()

    async def check(self, source: str) -> None:
        """Compile a grammar.

        Raises:
            ValueError: it is wrong, asks for what cannot be enforced, or is too much work.
        """
        digest = hashlib.sha256(source.encode()).digest()
        if digest in self._good:
            self._good.move_to_end(digest)
            return
        try:
            await self._worker.run(source)
        except TimeoutError:
            raise ValueError(f"it takes more than {_SECONDS:g} s to compile") from None
        except EOFError:
            raise ValueError("it takes too much memory to compile, or is nested too deep") from None
        self._good[digest] = None
        if len(self._good) > _REMEMBERED:
            self._good.popitem(last=False)

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
