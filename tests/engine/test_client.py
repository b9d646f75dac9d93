"""Answers on their way from the engine to who reads them."""

from types import SimpleNamespace
from typing import Any

from engine.client import AsyncEngine, ResponseStream
from engine.messages import EngineRequest, ImageInput
from engine.outputs import Delta
from engine.sampling_params import SamplingParams


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


def test_images_are_sent_once_for_all_answers() -> None:
    image = ImageInput(b"hash", 0, 1, b"pixels", (1, 2, 3), "pixels")
    requests = [EngineRequest(f"a/{n}", [1], SamplingParams(), 1, 0, images=[image]) for n in range(3)]
    sent: list[EngineRequest] = []
    engine: Any = object.__new__(AsyncEngine)
    engine.dead = SimpleNamespace(is_set=lambda: False)
    engine.inputs = SimpleNamespace(make_requests=lambda *_, **__: requests)
    engine._outputs, engine._streams = SimpleNamespace(add=lambda _: None), {}
    engine._send = lambda _, request: sent.append(request)
    engine.generate(None, SamplingParams(), max_tokens=1)
    assert [request.request_id for request in sent] == ["a/0", "a/1", "a/2"]
    assert [request.images[0].data for request in sent] == [b"pixels", b"", b""]
    assert {request.images[0].hash for request in sent} == {b"hash"} and image.data == b"pixels"
