"""What is found out about a server before it is measured."""

from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.target import connect
from tests.bench.fake import Fake


@pytest.mark.parametrize(
    ("version", "known"), [({"version": "7"}, {"version": "7"}), (None, None), ("7", None), ([], None)]
)
async def test_version(version: Any, known: Any) -> None:
    async with Fake(version=version).target() as target:
        assert target.described() == {"model": "first", "version": known}


async def test_model_and_key() -> None:
    async with Fake().serve() as fake:
        async with connect(f"{fake.url}v1/", model="second", api_key="k") as target:
            exchange = await target.post(b'{"messages": [{}]}')
        assert (target.model, exchange.status, fake.keys) == ("second", 200, {"Bearer k"})


async def test_failures_are_noted() -> None:
    async with Fake().serve() as fake:
        url = fake.url
        async with connect(url, timeout_s=0.2) as target:
            fake.wait_s = 5.0
            late = await target.post(b'{"messages": [{}]}')
    assert late.failure.startswith("TimeoutError") and late.ended - late.started < 4
    async with connect(url, model="m") as target:
        gone = await target.post(b"{}")
    assert gone.failure.startswith("ClientConnectorError") and target.version is None


@pytest.mark.parametrize("body", ["{}", '{"data": []}', "no JSON", '{"data": 5}'])
async def test_no_model(body: str) -> None:
    async def models(request: web.Request) -> web.Response:
        return web.Response(text=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/v1/models", models)
    async with TestServer(app) as server:
        with pytest.raises(
            RuntimeError,
            match="does not name a model .*: start a server, name another with --base-url, or give --model",
        ):
            async with connect(str(server.make_url("/"))):
                raise AssertionError("it connected")
