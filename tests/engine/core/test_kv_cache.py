import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.kv_cache import KVCache
from engine.core.request import Request
from engine.messages import EngineRequest, ImageInput
from engine.sampling_params import SamplingParams


def make(
    tokens: list[int],
    *,
    name: str = "r",
    images: tuple[tuple[bytes, int, int], ...] = (),
    salt: str = "",
    long_rope_start: int | None = None,
    prompt_logprobs: int | None = None,
) -> Request:
    placed = [ImageInput(digest, offset, size, b"", (), "pixels") for digest, offset, size in images]
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    source = EngineRequest(name, tokens, params, 4, seed=0, images=placed, cache_salt=salt)
    return Request(source, long_rope_start)


def start(cache: KVCache, request: Request, count: int | None = None) -> bool:
    """What the scheduler does to start a request."""
    prefix = cache.find_prefix(request)
    computed = len(prefix) * cache.block_size
    end = len(request.token_ids) if count is None else min(computed + count, len(request.token_ids))
    if not cache.start(request, prefix, end):
        return False
    request.num_computed_tokens = end
    cache.register(request)
    return True


def test_start_and_free() -> None:
    cache = KVCache(4, 2)
    request = make([1, 2, 3])
    assert (cache.capacity, cache.num_free, cache.usage) == (8, 4, 0)
    assert start(cache, request)
    assert (request.block_ids, cache.num_free, cache.usage) == ([0, 1], 2, 0.5)
    assert request.num_registered == 1
    cache.check_integrity([request])
    cache.free(request)
    assert (request.block_ids, request.num_registered, cache.num_free) == ([], 0, 4)
    cache.check_integrity([])


def test_start_takes_nothing_when_there_is_too_little() -> None:
    cache = KVCache(3, 2)
    first, second = make([1] * 4), make([1] * 4 + [2] * 4)
    assert start(cache, first)
    prefix = cache.find_prefix(second)
    assert prefix == first.block_ids
    assert not cache.start(second, prefix, 8)
    assert second.block_ids == []
    cache.check_integrity([first])
    # The prefix is free now, but it is part of what is needed.
    cache.free(first)
    assert not cache.start(second, prefix, 8)
    assert cache.num_free == 3
    assert cache.start(second, prefix, 6)
    assert second.block_ids[:2] == prefix
    cache.check_integrity([second])


def test_extend() -> None:
    cache = KVCache(3, 2)
    request = make([1])
    assert start(cache, request)
    assert cache.extend(request, 2) == []
    assert cache.extend(request, 3) == [1]
    assert cache.extend(request, 7) is None
    assert request.block_ids == [0, 1]
    assert cache.extend(request, 6) == [2]
    cache.check_integrity([request])


def test_only_full_computed_known_blocks_are_found() -> None:
    cache = KVCache(8, 2)
    request = make([1, 2, 3, 4, 5, 6, 7])
    assert cache.start(request, [], 7)
    other = make([1, 2, 3, 4, 5, 6, 7])
    for computed, found in ((0, 0), (1, 0), (2, 1), (3, 1), (5, 2), (7, 3)):
        request.num_computed_tokens = computed
        cache.register(request)
        assert cache.find_prefix(other) == request.block_ids[:found]
    request.num_computed_tokens = 8  # the eighth token is in flight
    cache.extend(request, 8)
    cache.register(request)
    assert request.num_registered == 3
    request.token_ids.append(8)
    cache.register(request)
    assert request.num_registered == 4
    assert len(cache.find_prefix(make([1, 2, 3, 4, 5, 6, 7, 8, 9]))) == 4


@pytest.mark.parametrize(("length", "found"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (9, 3)])
def test_last_token_is_never_in_the_prefix(length: int, found: int) -> None:
    cache = KVCache(8, 2)
    assert start(cache, make([1] * 6))
    assert len(cache.find_prefix(make([1] * length))) == found


def test_prefix_ends_at_the_first_gap() -> None:
    cache = KVCache(3, 2)
    first = make([1, 2, 3, 4, 5, 6])
    assert start(cache, first)
    cache.free(first)
    second = make([7])
    assert start(cache, second)  # takes the last block
    assert cache.find_prefix(make([1, 2, 3, 4, 5, 6, 7])) == [0, 1]
    assert cache.extend(second, 3) == [1]
    assert cache.find_prefix(make([1, 2, 3, 4, 5, 6, 7])) == [0]
    cache.check_integrity([second])


def test_block_in_use_is_shared_and_freed_once() -> None:
    cache = KVCache(4, 2)
    first, second = make([1, 2, 3]), make([1, 2, 4])
    assert start(cache, first)
    assert start(cache, second)
    assert first.block_ids[0] == second.block_ids[0]
    cache.check_integrity([first, second])
    cache.free(first)
    cache.check_integrity([second])
    assert cache.num_free == 2
    cache.free(second)
    cache.check_integrity([])


def test_longest_freed_goes_first() -> None:
    cache = KVCache(4, 1)
    first, second = make([1, 2]), make([3, 4])
    assert start(cache, first)
    assert start(cache, second)
    cache.free(second)
    cache.free(first)
    third = make([5, 6, 7, 8])
    assert start(cache, third)
    assert third.block_ids == [3, 2, 1, 0]


def test_equal_blocks_computed_twice() -> None:
    cache = KVCache(4, 2)
    first, second = make([1, 2, 3]), make([1, 2, 3])
    assert cache.start(first, [], 3)
    assert cache.start(second, [], 3)
    for request in (first, second):
        request.num_computed_tokens = 3
        cache.register(request)
    assert cache.find_prefix(make([1, 2, 3])) == [first.block_ids[0]]
    cache.check_integrity([first, second])


def test_switches() -> None:
    cache = KVCache(4, 2, enable_prefix_caching=False)
    assert start(cache, make([1, 2, 3]))
    assert cache.find_prefix(make([1, 2, 3])) == []
    cache = KVCache(4, 2)
    assert start(cache, make([1, 2, 3]))
    assert cache.find_prefix(make([1, 2, 3], prompt_logprobs=0)) == []
    assert len(cache.find_prefix(make([1, 2, 3]))) == 1
    cache.reset_prefixes()
    assert cache.find_prefix(make([1, 2, 3])) == []


@pytest.mark.parametrize(
    "other",
    [
        make([1, 2, 9, 9, 9, 4, 5], images=((b"y", 2, 3),)),
        make([1, 2, 9, 9, 9, 4, 5], images=((b"x", 1, 4),)),
        make([1, 2, 9, 9, 9, 4, 5], images=((b"x", 2, 2), (b"x", 4, 1))),
        make([1, 2, 9, 9, 9, 4, 5], images=()),
        make([1, 3, 9, 9, 9, 4, 5], images=((b"x", 2, 3),)),
        make([1, 2, 9, 9, 9, 4, 5], images=((b"x", 2, 3),), salt="s"),
        make([1, 2, 9, 9, 9, 4, 5], images=((b"x", 2, 3),), long_rope_start=5),
    ],
)
def test_blocks_that_differ(other: Request) -> None:
    request = make([1, 2, 9, 9, 9, 4, 5], images=((b"x", 2, 3),))
    same = make([1, 2, 9, 9, 9, 4, 6], images=((b"x", 2, 3),))
    assert request.block_hash(2, 2) == same.block_hash(2, 2)
    assert request.block_hash(2, 2) != other.block_hash(2, 2)


def test_image_later_in_the_prompt_does_not_matter() -> None:
    text, image = make([1, 2, 3, 4, 5]), make([1, 2, 9, 9, 5], images=((b"x", 2, 2),))
    assert text.block_hash(0, 2) == image.block_hash(0, 2)
    assert text.block_hash(1, 2) != image.block_hash(1, 2)


def test_block_of_one_place_differs_at_another() -> None:
    request = make([1, 2, 1, 2, 1, 2])
    assert len({request.block_hash(index, 2) for index in range(3)}) == 3


def test_longrope_is_part_of_a_block() -> None:
    """The rotary table changes with the prompt's length, or with the position when the answer makes it long."""
    short, long = make([1] * 4, long_rope_start=5), make([1] * 6, long_rope_start=5)
    assert short.block_hash(0, 2) != long.block_hash(0, 2)
    assert short.block_hash(0, 2) == make([1] * 5, long_rope_start=5).block_hash(0, 2)
    assert long.block_hash(0, 2) == make([1] * 9, long_rope_start=5).block_hash(0, 2)


@pytest.mark.parametrize("damage", ["references", "free", "hash"])
def test_integrity_check_sees_damage(damage: str) -> None:
    cache = KVCache(4, 2)
    request = make([1, 2, 3])
    assert start(cache, request)
    cache.check_integrity([request])
    if damage == "references":
        cache._references[3] = 1
    elif damage == "free":
        del cache._free[3]
    else:
        cache._hash_of.clear()
    with pytest.raises(AssertionError):
        cache.check_integrity([request])


@settings(derandomize=True, deadline=None, max_examples=300)
@given(data=st.data(), num_blocks=st.integers(1, 10), block_size=st.integers(1, 3))
def test_random_use(data: st.DataObject, num_blocks: int, block_size: int) -> None:
    """Against a model in which each block remembers the tokens, from the beginning on, that were written to it."""
    cache = KVCache(num_blocks, block_size)
    contents: dict[int, list[int]] = {}
    live: list[Request] = []

    def write(request: Request, first: int) -> None:
        for index in range(first // block_size, len(request.block_ids)):
            contents[request.block_ids[index]] = request.token_ids[: (index + 1) * block_size]

    for step in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["start", "start", "grow", "free", "reset"]))
        if action == "start":
            tokens = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=8))
            request = make(tokens, name=f"r{step}")
            before = cache.num_free
            prefix = cache.find_prefix(request)
            assert len(prefix) * block_size < len(tokens)
            for index, block in enumerate(prefix):
                assert contents[block] == tokens[: (index + 1) * block_size]
            if start(cache, request):
                write(request, len(prefix) * block_size)
                live.append(request)
            else:
                assert cache.num_free == before
        elif action == "grow" and live:
            request = data.draw(st.sampled_from(live))
            before = cache.num_free
            added = cache.extend(request, len(request.token_ids) + 1)
            assert (added is None) == (before == 0 and len(request.token_ids) % block_size == 0)
            if added is not None:
                known = len(request.token_ids)
                request.token_ids.append(data.draw(st.integers(1, 2)))
                request.num_computed_tokens += 1
                write(request, known)
                cache.register(request)
        elif action == "free" and live:
            cache.free(live.pop(data.draw(st.integers(0, len(live) - 1))))
        elif action == "reset":
            cache.reset_prefixes()
        cache.check_integrity(live)
        held = {block for request in live for block in request.block_ids}
        assert cache.num_free == num_blocks - len(held)
        for request in live:
            for index in range(len(request.token_ids) // block_size):
                assert contents[request.block_ids[index]] == request.token_ids[: (index + 1) * block_size]
