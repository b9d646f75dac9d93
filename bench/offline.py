"""Measures the engine without a server: how long a batch takes, and how much gets through."""

import time
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from bench.load import Load, pictures, text
from bench.report import Spread, spread
from engine import LLM, SamplingParams

_PLACEHOLDER = "<image>\n"


@dataclass(slots=True)
class Latency:
    """Of one batch, from start to end."""

    batch_size: int
    batch_ms: Spread
    ms_per_token: float
    """Of the batch's mean, divided by the length of its answers."""


@dataclass(slots=True)
class Throughput:
    """Of all requests given at once."""

    requests: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float


def measure_latency(llm: LLM, load: Load, *, batch_size: int, max_tokens: int, iterations: int, warmup: int) -> Latency:
    """Time batches of the same size, one after the other; no two have a picture or a question in common."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    seconds = []
    for number in tqdm(range(warmup + iterations), desc="Measuring", unit="batch", disable=None):
        batch = [prompt(llm, load, number, index) for index in range(batch_size)]
        started = time.perf_counter()
        llm.generate(batch, params, use_tqdm=False)
        if number >= warmup:
            seconds.append(time.perf_counter() - started)
    found = spread(seconds)
    assert found is not None
    return Latency(batch_size, found, found.mean / max_tokens)


def measure_throughput(llm: LLM, load: Load, *, requests: int, max_tokens: int) -> Throughput:
    """Give all requests at once and wait for the last answer."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    llm.generate(prompt(llm, load, 0, 0), params, use_tqdm=False)
    prompts = [prompt(llm, load, 1, index) for index in range(requests)]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    duration = time.perf_counter() - started
    written = sum(len(output.outputs[0].token_ids) for output in outputs)
    read = sum(len(output.prompt_token_ids) for output in outputs)
    return Throughput(requests, duration, requests / duration, written / duration, (written + read) / duration)


def prompt(llm: LLM, load: Load, part: int, index: int) -> dict[str, Any]:
    """One request as `LLM.generate` takes it; pictures only for a model that sees."""
    images = pictures(load, part, index) if llm.config.vision is not None else []
    return {
        "prompt": f"USER: {_PLACEHOLDER * len(images)}{text(load, part, index)} ASSISTANT:",
        "multi_modal_data": {"image": images},
    }
