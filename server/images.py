"""From encoded images to what the engine takes, off the event loop. Images that came before need no decoding."""

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor

from PIL import Image

from engine.image_decode import decode_image
from engine.image_processor import salted
from engine.input_processor import PreparedImage
from server.turns import Turns

_REMEMBERED_BYTES = 128 << 20
"""Of prepared images; some 400 of them of 336 x 336 pixels."""


class ImagePreparer:
    """Decodes and prepares images, and remembers the newest by the hash of their files.

    Args:
        prepare: from a decoded image to a prepared one; called in several threads at a time.
        executor: where the work is done.
        at_once: images that are worked on at a time; as many as the executor has threads.
        max_pixels: of an image.
        on_decode: told how many seconds each decoding took.
        on_prepare: the same of each call of `prepare`.
        remembered_bytes: of prepared images that are remembered.
    """

    def __init__(
        self,
        prepare: Callable[[Image.Image], PreparedImage],
        executor: Executor,
        *,
        at_once: int,
        max_pixels: int,
        on_decode: Callable[[float], None],
        on_prepare: Callable[[float], None],
        remembered_bytes: int = _REMEMBERED_BYTES,
    ) -> None:
        self._prepare = prepare
        self._executor = executor
        self._turns = Turns(at_once)
        self._max_pixels = max_pixels
        self._on_decode = on_decode
        self._on_prepare = on_prepare
        self._capacity = self._room = remembered_bytes
        self._remembered: OrderedDict[bytes, PreparedImage] = OrderedDict()
        self._lock = threading.Lock()

    async def prepare(self, data: bytes, cache_salt: str | None = None) -> PreparedImage:
        """Prepare an encoded image, unless one of the same salt is remembered.

        Raises:
            ImageError: it cannot be decoded.
            ValueError: it cannot be prepared.
        """
        async with self._turns.turn():
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._work, data, cache_salt or "")

    def _work(self, data: bytes, cache_salt: str) -> PreparedImage:
        digest = salted(hashlib.sha256(data).digest(), cache_salt)
        with self._lock:
            if digest in self._remembered:
                self._remembered.move_to_end(digest)
                return self._remembered[digest]
        started = time.monotonic()
        image = decode_image(data, max_pixels=self._max_pixels)
        decoded = time.monotonic()
        self._on_decode(decoded - started)
        prepared = self._prepare(image)
        self._on_prepare(time.monotonic() - decoded)
        with self._lock:
            self._remember(digest, prepared)
        return prepared

    def _remember(self, digest: bytes, prepared: PreparedImage) -> None:
        if digest in self._remembered or len(prepared.data) > self._capacity:
            return
        self._remembered[digest] = prepared
        self._room -= len(prepared.data)
        while self._room < 0:
            _, oldest = self._remembered.popitem(last=False)
            self._room += len(oldest.data)
