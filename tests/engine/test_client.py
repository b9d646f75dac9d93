"""Answers on their way from the engine to who reads them."""

from types import SimpleNamespace
from typing import Any

from engine.client import ResponseStream
from engine.outputs import Delta


def stream_of(count: int) -> ResponseStream:
    requests: Any = [SimpleNamespace(request_id=f"a/{index}") for index in range(count)]
    engine: Any = SimpleNamespace(abort=lambda ids: None)
    return ResponseStream(engine, requests)


async def test_what_a_slow_reader_has_not_read_is_merged() -> None:
    """However long it sleeps, one delta waits for each answer."""
    stream = stream_of(2)
    for number in range(1000):
        for index in range(2):
            last = number == 999
            stream.put(f"a/{index}", Delta(index, f"{number} ", [number], finish_reason="stop" if last else None))
    assert len(stream._waiting) == 2
    found = [delta async for delta in stream]
    assert [delta.index for delta in found] == [0, 1]
    for delta in found:
        assert delta.text == "".join(f"{number} " for number in range(1000))
        assert delta.token_ids == list(range(1000)) and delta.finish_reason == "stop"
