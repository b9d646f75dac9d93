"""The paged KV cache's book-keeping: which block belongs to whom, and which blocks hold a known prefix."""

from collections import OrderedDict

from engine.core.request import Request


class KVCache:
    """A pool of equal blocks with reference counts.

    A free block keeps its contents, and its place in the prefix cache, until it is handed out again; the block that
    was freed longest ago goes first. Every operation on one block takes constant time.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.queries = 0
        """Prompt tokens that were looked up in the prefix cache."""
        self.hits = 0
        """Prompt tokens that it gave."""
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no request holds."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that requests hold, 0 to 1."""
        return 1 - self.num_free / self.num_blocks

    @property
    def capacity(self) -> int:
        """Tokens that the whole cache holds."""
        return self.num_blocks * self.block_size

    def looks_up(self, request: Request) -> bool:
        """Whether a request may start with cached blocks; log probabilities of the prompt take computing all of it."""
        return self.enable_prefix_caching and request.source.params.prompt_logprobs is None

    def find_prefix(self, request: Request) -> list[int]:
        """The cached blocks that a request may start with; its last token is never among them, since computing that
        one gives the logits.
        """
        if not self.looks_up(request):
            return []
        found: list[int] = []
        for index in range((len(request.token_ids) - 1) // self.block_size):
            block = self._block_of.get(request.block_hash(index, self.block_size))
            if block is None:
                break
            found.append(block)
        return found

    def start(self, request: Request, prefix: list[int], num_tokens: int) -> bool:
        """Give a request the blocks of its prefix and fresh ones up to `num_tokens`; False, and nothing changed, when
        there are not enough.
        """
        fresh = self._blocks_for(num_tokens) - len(prefix)
        unheld = sum(self._references[block] == 0 for block in prefix)
        if fresh > self.num_free - unheld:
            return False
        for block in prefix:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
        request.block_ids = [*prefix, *(self._take() for _ in range(fresh))]
        request.num_registered = len(prefix)
        return True

    def extend(self, request: Request, num_tokens: int) -> list[int] | None:
        """Let a request hold `num_tokens` tokens; returns the blocks added, or None when there are not enough."""
        fresh = self._blocks_for(num_tokens) - len(request.block_ids)
        if fresh > self.num_free:
            return None
        blocks = [self._take() for _ in range(fresh)]
        request.block_ids += blocks
        return blocks

    def register(self, request: Request) -> None:
        """Make the full blocks whose tokens are known, and computed or being computed, known to the prefix cache."""
        if not self.enable_prefix_caching:
            return
        full = min(request.num_computed_tokens, len(request.token_ids)) // self.block_size
        for index in range(request.num_registered, full):
            digest = request.block_hash(index, self.block_size)
            block = request.block_ids[index]
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._hash_of[block] = digest
        request.num_registered = max(full, request.num_registered)

    def free(self, request: Request) -> None:
        """Take a request's blocks back. The last block becomes the first to be used again: beginnings are shared more
        often than ends.
        """
        for block in reversed(request.block_ids):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
        request.block_ids = []
        request.num_registered = 0

    def reset_prefixes(self) -> None:
        """Forget all cached prefixes, for instance when a step failed and its blocks were not written."""
        self._hash_of.clear()
        self._block_of.clear()

    def check_integrity(self, requests: list[Request]) -> None:
        """Raise `AssertionError` unless every block is accounted for by exactly these requests."""
        references = [0] * self.num_blocks
        for request in requests:
            assert len(set(request.block_ids)) == len(request.block_ids), "a request holds a block twice"
            for block in request.block_ids:
                references[block] += 1
        assert references == self._references, "reference counts differ from what requests hold"
        assert set(self._free) == {block for block, count in enumerate(references) if count == 0}
        assert {digest: block for block, digest in self._hash_of.items()} == self._block_of

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._references[block] = 1
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        return block
