"""Server-sent events as their readers see them."""

import json
from typing import Any

from tests.server.launch import Server


def read_events(text: str) -> list[dict[str, Any]]:
    """The objects of a stream whose framing was checked: one line of data each, then one `[DONE]`."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert [number for number, block in enumerate(blocks) if block == "data: [DONE]"] == [len(blocks) - 1]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def stream(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a request streams."""
    response = server.post(path, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return read_events(response.text)
