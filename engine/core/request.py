"""One sequence as the engine core sees it."""

import hashlib
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from llguidance import LLMatcher

from engine.messages import EngineRequest, ImageInput, PositionLogprobs

_SECONDS_PER_PRIORITY = 10.0
_MOST_AHEAD_SECONDS = 30.0


@dataclass(slots=True, eq=False)
class Request:
    """A sequence's progress.

        0 ........ num_computed_tokens ........ len(token_ids) ........ num_tokens
        |  in the cache, or on its way  |  known, to be computed  |  being sampled  |

    There is no prefill and no decode phase: each step lets `num_computed_tokens` catch up with `num_tokens`.
    """

    source: EngineRequest
    long_rope_start: int | None = None
    """Length from which the model's rotary tables change (longrope); part of a block's identity."""
    matcher: LLMatcher | None = None
    """Of what the answer must look like, at its beginning: kept, so that nothing is compiled between steps."""
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    """Tokens that launched steps will bring."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache gave at the first start."""
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of known tokens, as far as asked for."""
    num_registered: int = 0
    """Leading blocks that were made known to the prefix cache, or were so already."""
    held_images: set[bytes] = field(default_factory=set)
    """Hashes whose features the encoder cache keeps for this request."""
    scheduled_time: float = 0.0
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    """Of prompt tokens 1, 2, … as far as computed; what is computed again after preemption is not added again."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.source.prompt_token_ids)

    @property
    def id(self) -> str:
        """The request's name, unique among those that live."""
        return self.source.request_id

    @property
    def order(self) -> tuple[float, str]:
        """Who is served first: who came first, or counts as if it had by its priority. That has a bound, lest those who
        call themselves more important starve all others.
        """
        ahead = min(_MOST_AHEAD_SECONDS, max(-_MOST_AHEAD_SECONDS, _SECONDS_PER_PRIORITY * self.source.priority))
        return self.source.arrival_time + ahead, self.id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the client sent, image tokens counted in."""
        return len(self.source.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens and those in flight."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, those in flight counted in."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def max_total_tokens(self) -> int:
        """The most tokens that this sequence will ever have."""
        return self.num_prompt_tokens + self.source.max_tokens

    def images_in(self, start: int, end: int) -> list[ImageInput]:
        """Images with a placeholder token in [start, end)."""
        return [image for image in self.source.images if image.offset < end and image.end > start]

    def block_hash(self, wanted: int, block_size: int) -> bytes:
        """The identity of block number `wanted`, all of whose tokens are known.

        A block's hash covers its tokens, every image that reaches into it, all that lies before it, the client's salt
        and, where the model has two rotary tables, which one was used.
        """
        while len(self.block_hashes) <= wanted:
            index = len(self.block_hashes)
            start, end = index * block_size, (index + 1) * block_size
            digest = hashlib.sha256(self.block_hashes[-1] if index else self._root())
            digest.update(np.asarray(self.token_ids[start:end], dtype=np.int64).tobytes())
            for image in self.images_in(start, end):
                digest.update(image.hash + (start - image.offset).to_bytes(8, "little", signed=True))
            if self.long_rope_start is not None:
                prompt = self.num_prompt_tokens
                digest.update(bytes(max(prompt, i + 1) > self.long_rope_start for i in range(start, end)))
            self.block_hashes.append(digest.digest())
        return self.block_hashes[wanted]

    def _root(self) -> bytes:
        return hashlib.sha256(b"salt" + self.source.cache_salt.encode("utf-8", "surrogatepass")).digest()

    def check_images(self) -> None:
        """Raise `AssertionError` when images overlap, lie outside the prompt or out of order."""
        images = self.source.images
        assert all(a.end <= b.offset for a, b in pairwise(images))
        assert all(image.offset >= 0 and image.end <= self.num_prompt_tokens for image in images)
