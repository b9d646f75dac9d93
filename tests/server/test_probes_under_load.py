"""What watches a server gets its answers however busy it is."""

import asyncio
import base64
from pathlib import Path

import aiohttp
import numpy as np

from tests.server.launch import Server, image_part, text_part, user
from tests.soak.watch import Prober

REQUESTS, ROUNDS = 256, 3


async def test_health_and_metrics_while_256_requests_with_pictures_run(server: Server, photo_files: list[Path]) -> None:
    photo = photo_files[0].read_bytes()

    async def ask(session: aiohttp.ClientSession, number: int) -> list[int]:
        statuses = []
        for round_ in range(ROUNDS):
            data = base64.b64encode(photo + f"{number} {round_}".encode()).decode()  # each a file not seen before
            message = user(image_part(f"data:image/jpeg;base64,{data}"), text_part("What?"))
            body = {"messages": [message], "max_tokens": 16, "ignore_eos": True, "stream": True}
            async with session.post(f"{server.url}/v1/chat/completions", json=body) as response:
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
                statuses.append(response.status)
        return statuses

    prober = Prober(server.url)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            statuses = await asyncio.gather(*(ask(session, number) for number in range(REQUESTS)))
    finally:
        probes = await asyncio.to_thread(prober.stop)
    assert statuses == [[200] * ROUNDS] * REQUESTS
    assert probes.failed == 0
    for path, seconds in probes.seconds.items():
        assert len(seconds) > 10
        # Of a few the machine itself may take more: it runs other tests, these clients, and the model.
        assert np.quantile(seconds, 0.9) < 0.1, (path, sorted(seconds)[-10:])
