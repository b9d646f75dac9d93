"""Metrics of known traffic: each one that is promised is there, and says what happened."""

import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import SchedulerStats
from engine.outputs import Delta, RequestMetrics
from server.metrics import Metrics
from tests.conftest import MakeCheckpoint
from tests.server.house import House, open_house
from tests.server.launch import image_part, text_part, user

pytestmark = pytest.mark.asyncio(loop_scope="module")

FETCH_SECONDS = 0.3
"""That the server of the picture takes."""
COUNTERS = (
    "prompt_tokens_total", "generation_tokens_total", "request_success_total", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "num_preemptions_total", "image_encoder_seconds_total", "image_encoder_images_total",
)  # fmt: skip
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
HISTOGRAMS = (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "image_fetch_seconds", "image_decode_seconds", "image_prepare_seconds",
)  # fmt: skip

Reading = dict[str, float]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(checkpoint: MakeCheckpoint) -> AsyncIterator[House]:
    flags = ("--served-model-name", "vlm", "--allow-private-media-hosts", "--max-num-seqs", "2")
    async with open_house(checkpoint(), *flags) as house:
        yield house


async def read(house: House) -> Reading:
    """Every sample that is no bucket; those of labels beside the model's with their values behind the name."""
    found: Reading = {}
    for family in text_string_to_metric_families((await house.client.get("/metrics")).text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "vlm", sample
            if "le" not in labels:
                found[" ".join([sample.name.removeprefix("vllm:"), *labels.values()])] = sample.value
    return found


async def difference(house: House, before: Reading) -> Reading:
    """What was added to each, once nothing runs any more."""
    await house.settle()
    return {name: value - before.get(name, 0) for name, value in (await read(house)).items()}


@contextmanager
def slow_picture() -> Iterator[str]:
    """The address of a picture that nobody has seen before, on a server that takes its time."""
    encoded = io.BytesIO()
    Image.effect_noise((200, 100), 90).convert("RGB").save(encoded, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(FETCH_SECONDS)
            self.send_response(200)
            self.send_header("Content-Length", str(len(encoded.getvalue())))
            self.end_headers()
            self.wfile.write(encoded.getvalue())

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{listener.server_port}/picture.png"
        listener.shutdown()
        thread.join()


async def test_every_metric_is_there(house: House) -> None:
    text = (await house.client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    kinds = {"counter": COUNTERS, "gauge": GAUGES, "histogram": HISTOGRAMS}
    for kind, names in kinds.items():
        for name in names:
            assert families[f"vllm:{name.removesuffix('_total')}"].type == kind, name
            assert families[f"vllm:{name.removesuffix('_total')}"].samples, name
    assert len(families) == sum(map(len, kinds.values())), "what is told is listed here"


async def test_a_reader_that_comes_late() -> None:
    """Finds the first tokens in one piece; the first one still came when it came."""
    metrics = Metrics("vlm", SchedulerStats)
    times = RequestMetrics(arrival_time=10.0, first_token_time=11.0)
    metrics.delta(Delta(0, token_ids=[1, 2, 3], metrics=times), 0.0, 15.0)
    metrics.delta(Delta(0, token_ids=[4], metrics=times), 15.0, 15.5)
    text = metrics.render().decode()
    expected = {
        "time_to_first_token_seconds_sum": 1.0,
        "time_to_first_token_seconds_count": 1.0,
        "inter_token_latency_seconds_sum": 4.5,
        "inter_token_latency_seconds_count": 3.0,
    }
    for sample, value in expected.items():
        assert f'vllm:{sample}{{model_name="vlm"}} {value}\n' in text


async def test_counts(house: House) -> None:
    """Of answers in one piece and as streams, several at a time, by length and by a stop string."""
    before, usage = await read(house), []
    for fields in ({}, {"n": 3}, {"max_tokens": 1}, {"stop": [" "], "max_tokens": 200, "ignore_eos": True}):
        usage.append((await house.ask(**{"ignore_eos": True, **fields})).json()["usage"])
    text = (await house.ask(stream=True, ignore_eos=True, stream_options={"include_usage": True})).text
    moved = await difference(house, before)
    answers = 1 + 3 + 1 + 1 + 1
    generated = sum(one["completion_tokens"] for one in usage) + 12
    assert '"completion_tokens":12' in text
    assert moved["prompt_tokens_total"] == 5 * usage[0]["prompt_tokens"]
    assert moved["generation_tokens_total"] == generated
    assert (moved["request_success_total length"], moved["request_success_total stop"]) == (answers - 1, 1)
    assert moved["inter_token_latency_seconds_count"] == generated - answers
    for name in HISTOGRAMS:
        if not name.startswith(("image_", "inter_token")):
            assert moved[f"{name}_count"] == answers, name


async def test_an_echo_generates_nothing(house: House) -> None:
    before = await read(house)
    answer = await house.client.post("/v1/completions", json={"prompt": "Hello", "echo": True, "max_tokens": 0})
    moved = await difference(house, before)
    assert answer.json()["usage"]["completion_tokens"] == 0
    assert moved["generation_tokens_total"] == moved["time_to_first_token_seconds_count"] == 0
    assert moved["request_success_total length"] == 1


async def test_times_of_one_request(house: House) -> None:
    before, began = await read(house), time.monotonic()
    assert (await house.ask(max_tokens=100, ignore_eos=True)).status_code == 200
    took = time.monotonic() - began
    moved = {name.removesuffix("_sum"): value for name, value in (await difference(house, before)).items()}
    whole = moved["e2e_request_latency_seconds"]
    queue, prefill, decode = (moved[f"request_{name}_time_seconds"] for name in ("queue", "prefill", "decode"))
    assert queue > 0 and prefill > 0 and decode > 0 and 0 < whole < took
    assert queue + prefill + decode == pytest.approx(whole)
    assert queue + prefill == pytest.approx(moved["time_to_first_token_seconds"])
    # These are measured where tokens are handed on, which is a little later than they come.
    assert moved["inter_token_latency_seconds"] == pytest.approx(decode, rel=0.1, abs=0.02)


async def test_times_in_the_queue(house: House) -> None:
    """Two run at a time: who comes third waits for as long as they take."""
    before = await read(house)
    first = [asyncio.create_task(house.ask(max_tokens=400, ignore_eos=True)) for _ in range(2)]
    while house.state.engine.stats.num_running < 2:
        await asyncio.sleep(0.005)
    began = time.monotonic()
    third = asyncio.create_task(house.ask(max_tokens=1))
    while not (now := await read(house))["num_requests_waiting"]:
        assert not any(task.done() for task in first)
    assert (now["num_requests_running"], now["num_requests_waiting"]) == (2, 1)
    assert 0 < now["kv_cache_usage_perc"] <= 1
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    waited = time.monotonic() - began
    await asyncio.gather(*first, third)
    moved = await difference(house, before)
    assert moved["request_queue_time_seconds_sum"] == pytest.approx(waited, rel=0.3, abs=0.1)
    assert all(moved[name] == before[name] == 0 for name in GAUGES)


async def test_a_prefix_that_is_known(house: House) -> None:
    prompt = [7, 8, 9] * 30
    usage = []
    for known in (False, True):
        before = await read(house)
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
        usage.append((await house.client.post("/v1/completions", json=body)).json()["usage"])
        moved = await difference(house, before)
        assert moved["prefix_cache_queries_total"] == len(prompt)
        cached = usage[-1]["prompt_tokens_details"]["cached_tokens"]
        assert moved["prefix_cache_hits_total"] == cached
        assert (cached > 0) == known


async def test_times_of_images(house: House) -> None:
    before, began = await read(house), time.monotonic()
    with slow_picture() as url:
        for _ in range(2):  # fetched again, but known
            message = user(image_part(url), text_part("What is it?"))
            response = await house.ask(messages=[message], max_tokens=1)
            assert response.status_code == 200, response.text
    took = time.monotonic() - began
    moved = await difference(house, before)
    assert moved["image_fetch_seconds_count"] == 2
    assert 2 * FETCH_SECONDS < moved["image_fetch_seconds_sum"] < took
    for name in ("decode", "prepare"):
        assert moved[f"image_{name}_seconds_count"] == 1
    assert moved["image_encoder_images_total"] == 1
    work = [moved[f"image_{name}"] for name in ("decode_seconds_sum", "prepare_seconds_sum", "encoder_seconds_total")]
    assert all(seconds > 0 for seconds in work)
    assert sum(work) < took - moved["image_fetch_seconds_sum"]


async def test_answers_that_are_given_up(house: House) -> None:
    before = await read(house)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await house.ask(max_tokens=1000, ignore_eos=True, n=2)
    moved = await difference(house, before)
    assert moved["request_success_total abort"] == 2
    assert moved["e2e_request_latency_seconds_count"] == 0


async def test_what_is_refused_counts_as_nothing(house: House) -> None:
    before = await read(house)
    for fields in ({"temperature": -1}, {"messages": [user(image_part("data:image/png;base64,AAAA"))]}):
        assert (await house.ask(**fields)).status_code == 400
    moved = await difference(house, before)
    assert not any(moved.values()), moved
