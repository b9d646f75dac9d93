"""Which images' features the worker keeps, by image hash."""

from collections import OrderedDict

from engine.core.request import Request
from engine.messages import ImageInput


class EncoderCache:
    """Counts references; features that no request needs stay until their space is wanted, oldest first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        """Image tokens."""
        self._sizes: dict[bytes, int] = {}
        self._references: dict[bytes, int] = {}
        self._unused: OrderedDict[bytes, None] = OrderedDict()
        self._used = 0
        self._evicted: list[bytes] = []

    def has(self, image: ImageInput) -> bool:
        """Whether the features are there, or will be by the step that is being put together."""
        return image.hash in self._sizes

    def fits(self, images: list[ImageInput]) -> bool:
        """Whether all these images could be held at once, beside those that are held already."""
        wanted = {image.hash: image.num_tokens for image in images}
        new = sum(size for digest, size in wanted.items() if digest not in self._sizes)
        spare = sum(self._sizes[digest] for digest in self._unused if digest not in wanted)
        return new <= self.capacity - self._used + spare

    def put(self, image: ImageInput) -> None:
        """Make room for an image that is about to be encoded; `hold` or `spare` must follow."""
        while self._used + image.num_tokens > self.capacity:
            digest, _ = self._unused.popitem(last=False)
            self._used -= self._sizes.pop(digest)
            del self._references[digest]
            self._evicted.append(digest)
        self._sizes[image.hash] = image.num_tokens
        self._references[image.hash] = 0
        self._used += image.num_tokens

    def hold(self, request: Request, image: ImageInput) -> None:
        """Keep an image for a request; holding it again changes nothing."""
        if image.hash not in request.held_images:
            request.held_images.add(image.hash)
            self._references[image.hash] += 1
            self._unused.pop(image.hash, None)

    def spare(self, image: ImageInput) -> None:
        """Let an image stay longest of all those that nobody holds."""
        if self._references[image.hash] == 0:
            self._unused[image.hash] = None
            self._unused.move_to_end(image.hash)

    def release(self, request: Request, *, computed: int | None = None) -> None:
        """Let go of all images but the one that `computed` tokens end within; of all without it.

        An image that comes again later in the prompt is not kept for that: requests that wait for each other's images
        while they keep some of their own could wait for ever.
        """
        if not request.held_images:
            return
        images = request.source.images
        needed = set() if computed is None else {image.hash for image in images if image.offset < computed < image.end}
        for digest in request.held_images - needed:
            request.held_images.discard(digest)
            self._references[digest] -= 1
            if self._references[digest] == 0:
                self._unused[digest] = None

    def take_evicted(self) -> list[bytes]:
        """Hashes to be forgotten by the worker, since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def clear(self) -> None:
        """Forget all images that no request holds, for instance when a step failed."""
        for digest in self._unused:
            self._used -= self._sizes.pop(digest)
            del self._references[digest]
            self._evicted.append(digest)
        self._unused.clear()

    def check_integrity(self, requests: list[Request]) -> None:
        """Raise `AssertionError` unless every reference is accounted for by exactly these requests."""
        references = dict.fromkeys(self._sizes, 0)
        for request in requests:
            for digest in request.held_images:
                references[digest] += 1
        assert references == self._references, "references differ from what requests hold"
        assert set(self._unused) == {digest for digest, count in references.items() if count == 0}
        assert self._used == sum(self._sizes.values()) <= self.capacity
