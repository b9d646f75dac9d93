"""Fetching what clients name, over real sockets on the loopback interface."""

import asyncio
import base64
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from server.media import MediaError, MediaFetcher, MediaLimits, is_public
from server.turns import CLIENT

Fetch = Callable[..., Any]
CONTENTS = b"contents of an image"


@pytest.fixture
async def site() -> AsyncIterator[tuple[str, list[web.Request]]]:
    """A web server's address, and the requests that it got."""
    seen: list[web.Request] = []

    async def image(request: web.Request) -> web.Response:
        seen.append(request)
        return web.Response(body=CONTENTS, headers={"Set-Cookie": "who=you"})

    async def redirect(request: web.Request) -> web.Response:
        seen.append(request)
        return web.Response(
            status=302, headers={"Location": request.query.get("to", "/redirect"), "Set-Cookie": "who=you"}
        )

    async def status(request: web.Request) -> web.Response:
        return web.Response(status=int(request.query["code"]))

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 4096)
            await asyncio.sleep(float(request.query.get("pause", "0")))

    async def pieces(request: web.Request) -> web.StreamResponse:
        """A body of so many bytes in pieces of one each, all of which are there at once."""
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        request.transport.write(b"1\r\nx\r\n" * int(request.query["count"]) + b"0\r\n\r\n")
        return web.Response()

    async def compressed(request: web.Request) -> web.Response:
        return web.Response(body=b"zzzz", headers={"Content-Encoding": "gzip"})

    app = web.Application()
    app.add_routes(
        [
            web.get("/image", image),
            web.get("/redirect", redirect),
            web.get("/status", status),
            web.get("/endless", endless),
            web.get("/compressed", compressed),
            web.get("/pieces", pieces),
        ]
    )
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    await runner.cleanup()


@pytest.fixture
async def fetch() -> AsyncIterator[Fetch]:
    """Fetches a URL under limits."""
    fetchers: list[MediaFetcher] = []
    pool = ThreadPoolExecutor(2)

    async def run(url: str, **limits: Any) -> bytes:
        fetcher = MediaFetcher(MediaLimits(**{"allow_private_hosts": True, **limits}), pool)
        fetchers.append(fetcher)
        return await fetcher.fetch(url)

    yield run
    for fetcher in fetchers:
        await fetcher.aclose()
    pool.shutdown()


async def refused(awaitable: Any, match: str) -> None:
    with pytest.raises(MediaError, match=match) as caught:
        await awaitable
    assert "127.0.0.1" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


async def test_fetches_over_http(fetch: Fetch, site: tuple[str, list[web.Request]]) -> None:
    url, seen = site
    assert await fetch(f"{url}/image") == CONTENTS
    assert seen[0].headers["Host"] == url.removeprefix("http://")


async def test_names_keep_their_host_header(fetch: Fetch, site: tuple[str, list[web.Request]]) -> None:
    url, seen = site
    named = url.replace("127.0.0.1", "LOCALHOST.")
    assert await fetch(f"{named}/image") == CONTENTS
    assert seen[0].headers["Host"] == named.removeprefix("http://").lower().replace("localhost.:", "localhost:")


async def test_redirects_are_followed_and_counted(fetch: Fetch, site: tuple[str, list[web.Request]]) -> None:
    url, seen = site
    assert await fetch(f"{url}/redirect?to=/image") == CONTENTS
    assert all("Cookie" not in request.headers for request in seen)
    await refused(fetch(f"{url}/redirect?to=/image", max_redirects=0), "redirects more than 0")
    await refused(fetch(f"{url}/redirect"), "redirects more than 3")


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://host/x", "gopher://x", "http://u:p@host/"]
)
async def test_redirects_may_not_change_kind(fetch: Fetch, site: tuple[str, list[web.Request]], target: str) -> None:
    await refused(fetch(f"{site[0]}/redirect?to={target}"), "image URL|connection failed")


async def test_redirect_to_private_address_is_refused(
    fetch: Fetch, site: tuple[str, list[web.Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host counts as public here; the redirect's address is what must be vetted."""
    url, seen = site
    allowed = ip_address("127.0.0.1")
    monkeypatch.setattr("server.media.is_public", lambda address: address == allowed)
    port = url.rpartition(":")[2]
    target = f"http://127.0.0.2:{port}/image"
    await refused(fetch(f"{url}/redirect?to={target}", allow_private_hosts=False), "not public")
    assert [request.path for request in seen] == ["/redirect"]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]",
     "0.0.0.0", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fc00::1]", "224.0.0.1"],
)  # fmt: skip
async def test_private_hosts_are_refused(fetch: Fetch, host: str) -> None:
    await refused(fetch(f"http://{host}:9/x", allow_private_hosts=False), "not public|host was not found|not valid")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.1.1", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
     "2002:7f00:1::", "64:ff9b::7f00:1", "192.88.99.1", "::ffff:192.88.99.1", "168.63.129.16"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ip_address(address))


async def test_one_private_address_among_many_is_enough(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> list[Any]:
        return [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    await refused(fetch("http://example.com/x", allow_private_hosts=False), "not public")


async def test_domains(fetch: Fetch, site: tuple[str, list[web.Request]]) -> None:
    url, _ = site
    assert await fetch(f"{url}/image", allowed_domains=("127.0.0.1",)) == CONTENTS
    await refused(fetch(f"{url}/image", allowed_domains=("example.com",)), "allowed domains")
    target = url.replace("127.0.0.1", "localhost") + "/image"
    await refused(fetch(f"{url}/redirect?to={target}", allowed_domains=("127.0.0.1",)), "allowed domains")


async def test_sizes_and_times_are_bounded(fetch: Fetch, site: tuple[str, list[web.Request]]) -> None:
    url, _ = site
    await refused(fetch(f"{url}/image", max_image_bytes=3), "limit of 3 bytes")
    await refused(fetch(f"{url}/endless", max_image_bytes=100_000), "limit of 100000 bytes")
    await refused(fetch(f"{url}/endless?pause=0.05", timeout_s=0.4), r"within 0\.4 s")
    await refused(fetch(f"{url}/compressed"), "compressed")


async def test_pieces_of_a_byte_hold_nobody_up(fetch: Fetch, site: tuple[str, list[web.Request]]) -> None:
    url, _ = site
    assert await fetch(f"{url}/pieces?count=900") == b"x" * 900
    longest, ended = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal longest
        while not ended.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - before)

    watching = asyncio.create_task(watch())
    fetches = (refused(fetch(f"{url}/pieces?count=300000"), "pieces of a few bytes") for _ in range(8))
    await asyncio.gather(*fetches)
    ended.set()
    await watching
    assert longest < 0.4  # 2 s and more where all of them are taken in


async def test_so_many_fetches_are_under_way_at_a_time_and_clients_take_turns(
    site: tuple[str, list[web.Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = site
    pool = ThreadPoolExecutor(1)
    fetcher = MediaFetcher(MediaLimits(allow_private_hosts=True, max_concurrent_fetches=2, timeout_s=0.3), pool)
    under_way, most, begun = 0, 0, []
    fetch_http = fetcher._fetch_http

    async def counted(url: str) -> bytes:
        nonlocal under_way, most
        begun.append(CLIENT.get())
        under_way += 1
        most = max(most, under_way)
        try:
            return await fetch_http(url)
        finally:
            under_way -= 1

    async def ask(client: str, path: str) -> bytes:
        CLIENT.set((client,))
        return await fetcher.fetch(f"{url}/{path}")

    monkeypatch.setattr(fetcher, "_fetch_http", counted)
    slow = [asyncio.create_task(ask("many", "endless?pause=1")) for _ in range(10)]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(ask("one", "image"), 1) == CONTENTS  # behind two of the others, not ten
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    await fetcher.aclose()
    pool.shutdown()
    assert most == 2 and begun.index(("one",)) < 4


async def test_names_that_are_not_resolved_in_time_hold_nobody_up(
    fetch: Fetch, site: tuple[str, list[web.Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    released, running = threading.Event(), []
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **kwargs: Any) -> list[Any]:
        if host.startswith("slow"):
            running.append(host)
            released.wait(20)
        return list(real("127.0.0.1", *args, **kwargs))

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url, _ = site
    limits = MediaLimits(timeout_s=0.3, allow_private_hosts=True, max_concurrent_fetches=5)
    with ThreadPoolExecutor(1) as pool:
        fetcher = MediaFetcher(limits, pool)
        try:
            for _ in range(2):
                names = [fetcher.fetch(f"http://slow{number}.example/x") for number in range(4)]
                for error in await asyncio.gather(*names, return_exceptions=True):
                    assert isinstance(error, MediaError) and "within 0.3 s" in str(error)
                if len(running) == 4:  # the fifth thread is free
                    assert await fetcher.fetch(url.replace("127.0.0.1", "quick.example") + "/image") == CONTENTS
            # What nobody waits for any more still has its thread: no more are begun than there are.
            assert len(running) <= 5
            released.set()
            await asyncio.sleep(0.1)
            assert await fetcher.fetch(url.replace("127.0.0.1", "quick.example") + "/image") == CONTENTS
        finally:
            released.set()
            await fetcher.aclose()


async def test_no_proxy_and_no_password_of_the_environment(
    fetch: Fetch, site: tuple[str, list[web.Request]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, seen = site
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert await fetch(f"{url}/image") == CONTENTS
    assert "Authorization" not in seen[0].headers and "Cookie" not in seen[0].headers


@pytest.mark.parametrize("code", [204, 403, 404, 500])
async def test_status_is_told(fetch: Fetch, site: tuple[str, list[web.Request]], code: int) -> None:
    await refused(fetch(f"{site[0]}/status?code={code}"), str(code))


@pytest.mark.parametrize(
    "url",
    ["", "x", "http://", "http:///x", "http://[", "http://a b/", "javascript:alert(1)", "ftp://x/y", "http://u:p@h/",
     "http://host:0/", "http://host:99999/", "http://" + "a" * 9000, "http://\udcff/"],
)  # fmt: skip
async def test_bad_urls(fetch: Fetch, url: str) -> None:
    with pytest.raises(MediaError):
        await fetch(url)


async def test_connection_refused_is_told(fetch: Fetch) -> None:
    await refused(fetch("http://127.0.0.1:1/"), "connection failed")


@pytest.mark.parametrize("filling", [";", "ab;", "image/png;base64;"])
async def test_data_urls_whose_head_does_not_end(fetch: Fetch, filling: str) -> None:
    url = "data:" + filling * (20_000_000 // len(filling))
    started = time.perf_counter()
    await refused(fetch(url), "must look like")
    await refused(fetch(url + ",AAAA"), "must look like")
    assert time.perf_counter() - started < 0.5


async def test_data_urls(fetch: Fetch) -> None:
    for size in (0, 1, 100_000):
        payload = base64.b64encode(b"x" * size).decode()
        assert await fetch(f"data:image/png;base64,{payload}") == b"x" * size
        lines = base64.encodebytes(b"x" * size).decode()
        assert await fetch(f"data:image/png;base64,{lines}") == b"x" * size
    await refused(fetch("data:image/png;base64," + "A" * 40, max_image_bytes=20), "limit of 20 bytes")


@pytest.mark.parametrize(
    "url",
    ["data:", "data:,", "data:image/png,AAAA", "data:text/plain;base64,AAAA", "data:image/png;base64,A",
     "data:image/png;base64,AA-A", "data:image/png;base64,****", "data:image/png;base64,AA=A", "data:;base64,AAAA"],
)  # fmt: skip
async def test_bad_data_urls(fetch: Fetch, url: str) -> None:
    await refused(fetch(url), "data URL|base64")


async def test_local_files(fetch: Fetch, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        (folder / "a picture.png").write_bytes(CONTENTS)
    (inside / "link.png").symlink_to(outside / "a picture.png")
    os.mkfifo(inside / "pipe")
    assert await fetch(f"file://{inside}/a%20picture.png", allowed_local_path=inside) == CONTENTS
    messages = set()
    for path in ("missing.png", "../outside/a%20picture.png", "link.png", "pipe", "", "%00", "../../../etc/passwd"):
        with pytest.raises(MediaError) as caught:
            await fetch(f"file://{inside}/{path}", allowed_local_path=inside)
        messages.add(str(caught.value))
    for url in ("file://host/x", "file:relative.png", "file:///etc/passwd", "file://"):
        with pytest.raises(MediaError) as caught:
            await fetch(url, allowed_local_path=inside)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert str(tmp_path) not in messages.pop()
    await refused(fetch(f"file://{inside}/a%20picture.png"), "--allowed-local-media-path")
    await refused(fetch(f"file://{inside}/a%20picture.png", allowed_local_path=inside, max_image_bytes=3), "3 bytes")
