"""Fetching images that clients name: everything about the URL and what answers it is hostile until checked."""

import asyncio
import base64
import binascii
import contextlib
import ipaddress
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx

from server.turns import Turns

_MAX_URL_LENGTH = 8192
_DECODED_AT_ONCE = 64 << 10
_FREE_PIECES = 1000
_LEAST_BYTES_A_PIECE = 256
"""On average, of what comes in more pieces than are free: to take one in costs the same whatever it holds."""
_LONGEST_DATA_HEAD = 256
"""Characters of a `data:` URL before its data."""
_REDIRECTS = (301, 302, 303, 307, 308)
_NOT_FOUND = "the local file was not found or is not allowed"

_NOT_PUBLIC = (
    ipaddress.ip_network("192.88.99.0/24"),  # once the way to 6to4
    ipaddress.ip_network("168.63.129.16/32"),  # Azure's own services, from inside a machine there
)
"""What `is_global` lets through."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Observer = Callable[[float], None] | None


class MediaError(ValueError):
    """An image that cannot be had; the message is fit for a client."""


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What fetching may cost, and where it may go."""

    timeout_s: float = 5.0
    """Of one image's whole fetch: name lookup, redirects and body."""
    max_image_bytes: int = 20 << 20
    max_redirects: int = 3
    allowed_local_path: Path | None = None
    """Folder below which `file:` URLs may read; None: nowhere."""
    allowed_domains: tuple[str, ...] = ()
    """Exact host names; empty: any."""
    allow_private_hosts: bool = False
    max_concurrent_fetches: int = 64


class MediaFetcher:
    """Loads images from `http:`, `https:`, `data:` and `file:` URLs. Files are read in the executor."""

    def __init__(self, limits: MediaLimits, executor: Executor, *, on_fetch: _Observer = None) -> None:
        self._limits = limits
        self._executor = executor
        self._on_fetch = on_fetch
        self._turns = Turns(limits.max_concurrent_fetches)
        self._lookups = asyncio.Semaphore(limits.max_concurrent_fetches)
        """Held until a look-up has ended, not only until nobody waits for it any more."""
        self._resolvers = ThreadPoolExecutor(limits.max_concurrent_fetches, thread_name_prefix="resolve")
        # No proxy or password from the environment, no cookie from one site or client to the next.
        self._client = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=None,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "vlm-server"},
            limits=httpx.Limits(max_connections=limits.max_concurrent_fetches, max_keepalive_connections=0),
        )

    async def aclose(self) -> None:
        """Close connections."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)
        await self._client.aclose()

    async def fetch(self, url: str) -> bytes:
        """The encoded image that a URL names.

        Raises:
            MediaError: the URL is refused, nothing answers in time, or it is not what it should be.
        """
        scheme = self.check(url)
        if scheme == "data":
            return await self._fetch_data(url)
        if scheme == "file":
            return await self._in_thread(self._read_file, url)
        started = time.monotonic()
        async with self._turns.turn():
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    data = await self._fetch_http(url)
            except TimeoutError:
                raise MediaError(f"the image could not be fetched within {self._limits.timeout_s:g} s") from None
        _observe(self._on_fetch, started)
        return data

    def check(self, url: str) -> str:
        """Look at the text of a URL alone, and give its scheme.

        Raises:
            MediaError: the URL is refused.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return scheme
        if scheme not in ("http", "https", "file"):
            raise MediaError(
                f"an image URL that begins with {url[:10]!r} is not allowed: http:, https:, data: and file: are"
            )
        if len(url) > _MAX_URL_LENGTH:
            raise MediaError(f"the image URL has {len(url)} characters: at most {_MAX_URL_LENGTH} are allowed")
        if scheme != "file":
            self._parse(url)
        return scheme

    async def _in_thread(self, function: Callable[[str], bytes], argument: str) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, argument)

    async def _fetch_http(self, url: str) -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            async with self._open(url) as response:
                if response.status_code in _REDIRECTS:
                    url = _next_url(url, response)
                    continue
                if response.status_code != 200:
                    raise MediaError(f"the image could not be fetched: its server answered {response.status_code}")
                return await self._read_body(response)
        raise MediaError(f"the image URL redirects more than {self._limits.max_redirects} times")

    @asynccontextmanager
    async def _open(self, url: str) -> AsyncIterator[httpx.Response]:
        """Request a URL at an address that was vetted, under the name that it has in the URL."""
        parsed = self._parse(url)
        host = parsed.host
        address = await self._vetted_address(host, parsed.port or (443 if parsed.scheme == "https" else 80))
        request = self._client.build_request(
            "GET",
            parsed.copy_with(host=str(address)),
            headers={"Host": parsed.netloc.decode("ascii")},
            extensions={"sni_hostname": host},
        )
        try:
            response = await self._client.send(request, stream=True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            raise MediaError("the image could not be fetched: the connection failed") from None
        try:
            yield response
        finally:
            await response.aclose()

    def _parse(self, url: str) -> httpx.URL:
        try:
            parsed = httpx.URL(url)
            host = parsed.host.lower().rstrip(".")
        except (httpx.InvalidURL, ValueError, TypeError):
            raise MediaError("the image URL is not valid") from None
        if parsed.scheme not in ("http", "https") or not host:
            raise MediaError("the image URL is not valid, or redirects to what is not http or https")
        if parsed.userinfo:
            raise MediaError("image URLs with a user name or password are not allowed")
        if parsed.port == 0:
            raise MediaError("the image URL is not valid")
        if self._limits.allowed_domains and host not in self._limits.allowed_domains:
            raise MediaError("the image URL leads to a host that is not among the allowed domains")
        return parsed.copy_with(host=host)

    async def _vetted_address(self, host: str, port: int) -> _Address:
        """An address of the host, all of whose addresses may be connected to."""
        try:
            found = await self._look_up(host, port)
            addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        except (OSError, ValueError, UnicodeError):
            raise MediaError("the image could not be fetched: its host was not found") from None
        if not self._limits.allow_private_hosts and not all(is_public(address) for address in addresses):
            raise MediaError(
                "the image URL leads to an address that is not public, which takes --allow-private-media-hosts"
            )
        if not addresses:
            raise MediaError("the image could not be fetched: its host was not found")
        return addresses[0]

    async def _look_up(self, host: str, port: int) -> list[Any]:
        """By threads of our own: an event loop has few for that, and names whose servers do not answer hold each of
        them for longer than anybody waits.
        """
        await self._lookups.acquire()
        loop = asyncio.get_running_loop()
        try:
            future = self._resolvers.submit(_tcp_addresses, host, port)
        except BaseException:
            self._lookups.release()
            raise

        def release(_: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._lookups.release)

        future.add_done_callback(release)
        return await asyncio.wrap_future(future)

    async def _read_body(self, response: httpx.Response) -> bytes:
        limit = self._limits.max_image_bytes
        length = response.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        if response.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            raise MediaError("the image could not be fetched: its server sent it compressed, unasked")
        chunks, size = [], 0
        try:
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
                if len(chunks) > _FREE_PIECES + size // _LEAST_BYTES_A_PIECE:
                    raise MediaError("the image could not be fetched: its server sent it in pieces of a few bytes")
                if len(chunks) % 64 == 0:
                    await asyncio.sleep(0)  # what has come already is given without a pause
        except httpx.HTTPError:
            raise MediaError("the image could not be fetched: the connection broke") from None
        return b"".join(chunks)

    async def _fetch_data(self, url: str) -> bytes:
        comma = url.find(",", 0, _LONGEST_DATA_HEAD)
        words = url[len("data:") : max(0, comma)].lower().split(";")
        payload = url[comma + 1 :]
        if comma < 0 or not words[0].startswith("image/") or words[-1] != "base64" or len(words) < 2:
            raise MediaError("image data URLs must look like data:image/png;base64,…")
        limit = self._limits.max_image_bytes
        if len(payload) > -(-limit // 3) * 4:
            raise _too_large(limit)
        if len(payload) <= _DECODED_AT_ONCE:
            return _decode_base64(payload)
        return await self._in_thread(_decode_base64, payload)

    def _read_file(self, url: str) -> bytes:
        """Read a regular file below the allowed folder; what is missing and what is forbidden look the same."""
        root = self._limits.allowed_local_path
        if root is None:
            raise MediaError("local files are not allowed: the server runs without --allowed-local-media-path")
        rest = url[len("file:") :]
        path = unquote(rest.removeprefix("//") if rest.startswith("///") else rest)
        try:
            resolved = Path(path).resolve(strict=True)
            if not path.startswith("/") or not resolved.is_relative_to(root.resolve(strict=True)):
                raise MediaError(_NOT_FOUND)
            # Not blocking, lest a named pipe hold the thread; not following, lest a link was put there meanwhile.
            descriptor = os.open(resolved, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise MediaError(_NOT_FOUND)
                data = file.read(self._limits.max_image_bytes + 1)
        except (OSError, ValueError, RuntimeError) as error:
            raise error if isinstance(error, MediaError) else MediaError(_NOT_FOUND) from None
        if len(data) > self._limits.max_image_bytes:
            raise _too_large(self._limits.max_image_bytes)
        return data


def is_public(address: _Address) -> bool:
    """Whether an address is on the public internet, and so is every IPv4 address that an IPv6 one embeds."""
    embedded: list[_Address] = []
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None:
            embedded.append(address.sixtofour)
        if address.teredo is not None:
            embedded += address.teredo
        if address in ipaddress.ip_network("64:ff9b::/96"):
            embedded.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if any(address in network for network in _NOT_PUBLIC):
        return False
    usable = address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)
    return usable and all(is_public(inner) for inner in embedded)


def _tcp_addresses(host: str, port: int) -> list[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)


def _next_url(url: str, response: httpx.Response) -> str:
    location = response.headers.get("location", "")
    if not location or len(location) > _MAX_URL_LENGTH:
        raise MediaError("the image could not be fetched: its server sent a redirect that leads nowhere")
    try:
        return str(httpx.URL(url).join(location))
    except (httpx.InvalidURL, ValueError):
        raise MediaError("the image could not be fetched: its server sent a redirect that leads nowhere") from None


def _decode_base64(payload: str) -> bytes:
    try:
        # Lines are broken in what many programs make of a file.
        return base64.b64decode(payload.encode().translate(None, b"\r\n\t "), validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("the image's data is not valid base64") from None


def _too_large(limit: int) -> MediaError:
    return MediaError(f"the image is larger than the limit of {limit} bytes")


def _observe(observer: _Observer, started: float) -> None:
    if observer is not None:
        observer(time.monotonic() - started)
