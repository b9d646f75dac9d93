"""The model that ships with the project: its answers are right, and Hugging Face's."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from demo.dialogue import build_tokenizer
from demo.evaluate import EXAMS, asker, data_url, questions
from demo.make_samples import FOLDER
from demo.scenes import make_example
from engine import LLM, SamplingParams
from engine.args import DEMO_MODEL
from tests.server.launch import Launch, Server, image_part, text_part, user


@pytest.fixture(scope="module")
def server(launch: Launch) -> Server:
    return launch(DEMO_MODEL)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    ("file", "question", "answer"),
    [
        (
            "shapes.png",
            "What is in this picture?",
            "There are three shapes: a large orange rectangle at the top left, a small brown ring on the right and a "
            "large pink star at the bottom left.",
        ),
        ("shapes.png", "How many shapes are there?", "There are three shapes."),
        ("word.png", "What does it say?", 'It says "HELLO".'),
        ("chart.jpg", "Which bar is the tallest?", "Bar B is the tallest."),
    ],
)
def test_samples(client: OpenAI, file: str, question: str, answer: str) -> None:
    with Image.open(FOLDER / file) as image:
        messages = [user(image_part(data_url(image)), text_part(question))]
    response = client.chat.completions.create(model="demo", messages=messages, max_tokens=64)  # type: ignore[arg-type]
    assert (response.choices[0].message.content or "").strip() == answer


LEAST = {"follow-up": 8, "read a word": 8, "read two words": 8, "chart": 8, "not there": 8, "compare": 6}
"""Right answers of ten, where it is not nine."""


@pytest.mark.parametrize("name", [*EXAMS, "talk"])
def test_ten_questions_of_a_kind(client: OpenAI, name: str) -> None:
    asked = questions(name, 10)
    with ThreadPoolExecutor(len(asked)) as pool:
        given = list(pool.map(asker(client, "demo"), asked))
    right = [answer == question.answer for answer, question in zip(given, asked, strict=True)]
    assert sum(right) >= LEAST.get(name, 9), right


def test_photographs_are_beyond_it(client: OpenAI, photo_files: list[Path]) -> None:
    for file in photo_files:
        with Image.open(file) as photo:
            messages = [user(image_part(data_url(photo)), text_part("What is in this picture?"))]
        response = client.chat.completions.create(model="demo", messages=messages)  # type: ignore[arg-type]
        assert (response.choices[0].message.content or "").strip().startswith("I cannot tell")


def test_tokenizer_is_the_one_that_training_makes() -> None:
    assert (DEMO_MODEL / "tokenizer.json").read_text() == build_tokenizer().to_str(pretty=True)


def test_equals_hugging_face() -> None:
    examples = [make_example(31, index, num_turns=1, longest=500) for index in range(50)]
    prompts = [f"USER: <image>\n{example.turns[0].question} ASSISTANT:" for example in examples]
    given = [
        {"prompt": prompt, "multi_modal_data": {"image": example.image}}
        for prompt, example in zip(prompts, examples, strict=True)
    ]
    llm = LLM(device="cpu")
    outputs = llm.generate(given, SamplingParams(temperature=0, max_tokens=96), use_tqdm=False)  # type: ignore[arg-type]
    model: Any = LlavaForConditionalGeneration.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    processor: Any = AutoProcessor.from_pretrained(DEMO_MODEL)
    for prompt, example, output in zip(prompts, examples, outputs, strict=True):
        inputs = processor(images=example.image, text=prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == output.prompt_token_ids
        with torch.inference_mode():
            expected = model.generate(**inputs, max_new_tokens=96)
        assert output.outputs[0].token_ids == expected[0, inputs["input_ids"].shape[1] :].tolist()
