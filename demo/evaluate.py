"""Measures the demo model through its server, on pictures that it was not trained on.

    python -m demo.evaluate --base-url http://127.0.0.1:8000/v1 [--count N]

Answers are greedy, and right when they are right to the letter.
"""

import argparse
import base64
import io
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

from openai import OpenAI
from PIL import Image
from tqdm import tqdm

from demo.phrases import Turn
from demo.questions import ask_about
from demo.scenes import Example, make_example
from demo.talk import aside, talk

SEED = 2_000_003
"""Of the pictures; training and its own measurement have others."""


@dataclass(frozen=True, slots=True)
class Exam:
    """One kind of question."""

    topic: str
    features: tuple[str, ...]
    """Pictures that it is asked about."""
    follows: bool = False
    """Whether it goes on from a question before it."""
    num_words: int | None = None
    """Words printed in the picture; None: any number."""


EXAMS = {
    "color": Exam("color", ("shapes",)),
    "kind": Exam("kind", ("shapes",)),
    "place": Exam("place", ("shapes",)),
    "size": Exam("size", ("shapes",)),
    "count": Exam("count", ("shapes",)),
    "yes/no": Exam("yes/no", ("shapes",)),
    "compare": Exam("compare", ("shapes", "chart")),
    "read a word": Exam("read", ("words", "words and shapes"), num_words=1),
    "read two words": Exam("read", ("words",), num_words=2),
    "chart": Exam("chart", ("chart",)),
    "describe": Exam("describe", ("shapes", "words", "words and shapes", "chart")),
    "json": Exam("json", ("shapes",)),
    "not there": Exam("honest", ("shapes", "words", "words and shapes", "chart")),
    "cannot tell": Exam("honest", ("strange", "blank")),
    "follow-up": Exam("follow-up", ("shapes",), follows=True),
}


@dataclass(slots=True)
class Question:
    """What is sent, and what should come back."""

    messages: list[dict[str, Any]]
    answer: str


def questions(name: str, count: int) -> list[Question]:
    """So many questions of a kind, each about a picture of its own."""
    if name == "talk":
        return [_talk(index) for index in range(count)]
    exam, found = EXAMS[name], list[Question]()
    for index in itertools.count():
        feature = exam.features[index % len(exam.features)]
        example = make_example(SEED + sum(map(ord, name)), index, feature=feature, num_turns=8 if exam.follows else 0)
        turns = _turns(exam, example, Random(f"{SEED}/{name}/{index}"))
        if turns:
            found.append(_question(example.image, turns))
        if len(found) == count:
            break
    return found


def _talk(index: int) -> Question:
    """Every other one beside a picture."""
    random = Random(f"{SEED}/talk/{index}")
    if index % 2 == 0:
        return _question(None, [talk(random)])
    return _question(make_example(SEED, index, num_turns=0).image, [aside(random)])


def _turns(exam: Exam, example: Example, random: Random) -> list[Turn]:
    """A conversation that ends with the question; empty if the picture gives none."""
    if exam.num_words not in (None, len(example.scene.words)):
        return []
    if exam.follows:
        asked = (i for i, turn in enumerate(example.turns) if turn.topic.startswith(exam.topic))
        return example.turns[: next(asked, -1) + 1]
    turn = ask_about(exam.topic, example.scene, random)
    return [] if turn is None else [turn]


def data_url(image: Image.Image) -> str:
    """A picture as clients send it."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _question(image: Image.Image | None, turns: list[Turn]) -> Question:
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    if image is not None:
        picture = {"type": "image_url", "image_url": {"url": data_url(image)}}
        messages[0]["content"] = [picture, {"type": "text", "text": turns[0].question}]
    return Question(messages[:-1], turns[-1].answer)


def asker(client: OpenAI, model: str) -> Callable[[Question], str]:
    """Puts questions to a server, greedily."""

    def ask(question: Question) -> str:
        messages: Any = question.messages
        response = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=128)
        return (response.choices[0].message.content or "").strip()

    return ask


def main() -> None:
    """Print the share of right answers for each kind of question."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description="Measure the demo model.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--count", type=int, default=300, help="questions of each kind (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="questions at once (default: %(default)s)")
    parser.add_argument("--show-wrong", type=int, default=0, help="wrong answers of each kind to print (default: 0)")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key="none", timeout=120)
    ask = asker(client, client.models.list().data[0].id)
    with ThreadPoolExecutor(args.concurrency) as pool:
        for name in (*EXAMS, "talk"):
            asked = questions(name, args.count)
            given = list(tqdm(pool.map(ask, asked), total=len(asked), desc=name, leave=False, disable=None))
            wrong = [(q, answer) for q, answer in zip(asked, given, strict=True) if answer != q.answer]
            print(f"{name:14} {1 - len(wrong) / len(asked):7.2%} of {len(asked)}", flush=True)
            for question, answer in wrong[: args.show_wrong]:
                print(f"    expected {question.answer!r}, got {answer!r}")


if __name__ == "__main__":
    main()
