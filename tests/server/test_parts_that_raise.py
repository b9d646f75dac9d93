"""A part of the server that fails for one request: that one gets an error, the others their exact answers."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import jinja2
import pytest
import pytest_asyncio

from engine.detokenizer import Detokenizer
from server.chat import Chat
from tests.conftest import MakeCheckpoint
from tests.server.errors import error_of
from tests.server.house import House, open_house
from tests.server.launch import image_part, text_part, user
from tests.soak.pictures import data_url, noise

pytestmark = pytest.mark.asyncio(loop_scope="module")

Place = Callable[[House], tuple[Any, str]]
PLACES: dict[str, Place] = {
    "template": lambda house: (house.state.template, "render"),
    "tokenizer": lambda house: (house.state.inputs, "encode"),
    "image decoding": lambda house: (house.state.images, "_work"),
    "image processor": lambda house: (house.state.images, "_prepare"),
    "placeholders": lambda house: (house.state.inputs, "process"),
    "requests": lambda house: (house.state.inputs, "make_requests"),
    "sending": lambda house: (house.state.engine, "_send"),
    "output processor": lambda house: (house.state.engine._outputs, "_push"),
    "detokenizer": lambda house: (Detokenizer, "push"),
    "metrics": lambda house: (house.state.metrics, "delta"),
    "answer": lambda house: (Chat, "_choice"),
    "event": lambda house: (Chat, "_delta_chunks"),
}
ERRORS = [RuntimeError("a secret"), MemoryError(), KeyError("a secret"), jinja2.TemplateError("a secret")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(checkpoint: MakeCheckpoint) -> AsyncIterator[House]:
    async with open_house(checkpoint()) as house:
        yield house


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", PLACES)
async def test_a_part_that_raises(
    house: House, place: str, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if place == ("answer" if stream else "event"):
        return
    number = sorted(PLACES).index(place)
    owner, name = PLACES[place](house)
    work, calls = getattr(owner, name), 0

    def raise_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ERRORS[number % len(ERRORS)]
        return work(*args, **kwargs)

    urls = [data_url(noise(random.Random(4 * number + i))) for i in range(4)]
    some = [{"messages": [user(image_part(url), text_part("What?"))]} for url in urls]
    alone = [_said((await house.ask(**fields, stream=stream)).text) for fields in some]
    house.state.images._remembered.clear()  # so that there is something to decode
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raise_once)
        found = await asyncio.gather(*(house.ask(**fields, stream=stream) for fields in some))
    assert calls >= 2
    failed = [index for index, response in enumerate(found) if "error" in response.text]
    assert len(failed) == 1
    response = found[failed[0]]
    assert "secret" not in response.text
    if response.status_code == 200:
        assert stream
        lines = response.text.split("\n\n")
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["message"] and lines[-2] == "data: [DONE]"
    else:
        error_of(response, 500)
        assert response.headers["x-request-id"]
    for index in {0, 1, 2, 3} - set(failed):
        assert _said(found[index].text) == alone[index]
    assert "Traceback" in caplog.text, "nothing tells of it"
    await house.check()


def _said(text: str) -> str:
    """The answer of a chat, in one piece or as a stream."""
    if text.startswith("{"):
        return str(json.loads(text)["choices"][0]["message"]["content"])
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
