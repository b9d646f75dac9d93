"""The soak in short, so that it does not rot."""

import asyncio

import pytest

from engine.args import DEMO_MODEL
from tests.server.conftest import launch as launch
from tests.server.launch import Launch, Server
from tests.soak.cases import make_cases
from tests.soak.client import Client, Tally
from tests.soak.clients import FLAGS, Settings, soak
from tests.soak.mistakes import MISTAKES


@pytest.fixture(scope="module")
def server(launch: Launch) -> Server:
    return launch(DEMO_MODEL, "--served-model-name", "soak", *FLAGS)


async def test_each_mistake_gets_its_status(server: Server) -> None:
    tally = Tally()
    async with Client(server.url, [], 0, tally) as client:
        for mistake in MISTAKES:
            await client.err(mistake)
    assert not tally.unexpected


def test_a_few_seconds(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(server.url, server.process.pid, seconds=4, clients=6, cases=6, seed=3, interval_s=0.5)
    assert asyncio.run(soak(settings)) == []
    assert "0 wrong; 0 unexpected" in capsys.readouterr().out


def test_a_wrong_answer_is_seen(server: Server) -> None:
    """Or else the soak would prove nothing."""
    tally = Tally()

    async def ask() -> None:
        cases = make_cases(3, 3)
        async with Client(server.url, cases, 5, tally) as client:
            for case in cases:
                case.answer = "Nobody says that."
            await client._ask()

    asyncio.run(ask())
    assert tally.wrong and tally.compared
