"""Preparing images, and not doing it twice."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from engine.image_decode import ImageError
from engine.input_processor import PreparedImage
from server.images import ImagePreparer
from server.state import ServerState
from server.turns import CLIENT

SIZE = 1000
"""Bytes of each prepared image."""


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


class Preparer(ImagePreparer):
    """Counts what is prepared."""

    def __init__(self, executor: Executor, *, remembered: int) -> None:
        self.seen: list[tuple[int, int]] = []
        self.times: list[float] = []
        self.prepare_times: list[float] = []
        super().__init__(
            self._count,
            executor,
            at_once=2,
            max_pixels=10**6,
            on_decode=self.times.append,
            on_prepare=self.prepare_times.append,
            remembered_bytes=remembered * SIZE,
        )

    def _count(self, image: Image.Image) -> PreparedImage:
        self.seen.append(image.size)
        return PreparedImage(b"hash", bytes([image.width % 256]) * SIZE, (SIZE,), "pixels")


def encoded(tmp_path: Path, width: int) -> bytes:
    path = tmp_path / f"{width}.png"
    Image.new("RGB", (width, 10)).save(path)
    return path.read_bytes()


async def test_images_that_came_before_are_not_decoded_again(tmp_path: Path, executor: Executor) -> None:
    preparer = Preparer(executor, remembered=2)
    one, two, three = (encoded(tmp_path, width) for width in (1, 2, 3))
    for data, width in ((one, 1), (two, 2), (one, 1), (three, 3), (one, 1), (two, 2)):
        assert (await preparer.prepare(data)).data == bytes([width]) * SIZE
    # The third drove out the second, which had not been wanted for longest.
    assert preparer.seen == [(1, 10), (2, 10), (3, 10), (2, 10)]
    assert len(preparer.times) == len(preparer.prepare_times) == 4


async def test_what_is_too_large_is_not_remembered(tmp_path: Path, executor: Executor) -> None:
    preparer = Preparer(executor, remembered=0)
    for _ in range(2):
        await preparer.prepare(encoded(tmp_path, 1))
    assert len(preparer.seen) == 2


async def test_failures_are_not_remembered(executor: Executor) -> None:
    preparer = Preparer(executor, remembered=2)
    for _ in range(2):
        with pytest.raises(ImageError):
            await preparer.prepare(b"no image")
    assert not preparer.seen
    assert not preparer.times and not preparer.prepare_times


async def test_clients_take_turns(tmp_path: Path, executor: Executor) -> None:
    preparer = Preparer(executor, remembered=0)

    async def ask(client: str, width: int) -> None:
        CLIENT.set((client,))
        await preparer.prepare(encoded(tmp_path, width))

    many = [asyncio.create_task(ask("many", width)) for width in range(1, 20)]
    await asyncio.sleep(0)
    await ask("one", 99)
    await asyncio.gather(*many)
    assert len(preparer.seen) == 20 and preparer.seen.index((99, 10)) < 6


async def test_one_request_leaves_room_for_others() -> None:
    """However many images it has, some are loaded at a time, in order."""
    now, most = 0, 0

    async def prepare(data: str, cache_salt: str | None) -> str:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.001)
        now -= 1
        return data

    async def fetch(url: str) -> str:
        return url

    state: Any = SimpleNamespace(
        inputs=SimpleNamespace(check_image_count=lambda count: None),
        config=SimpleNamespace(vision=None),
        images=SimpleNamespace(prepare=prepare),
        media=SimpleNamespace(fetch=fetch),
    )
    urls = [f"{number}" for number in range(50)]
    loaded: Any = await ServerState.load_images(state, urls)
    assert loaded == urls
    assert 1 < most <= 8
