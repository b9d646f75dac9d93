"""Questions whose greedy answers are asked for beforehand, in the forms of each endpoint."""

import random
from dataclasses import dataclass, field
from typing import Any

from demo.talk import talk
from tests.soak.pictures import data_url, picture, renamed

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
_QUESTIONS = [
    "Describe the picture.", "How many shapes are there?", "What does it say?", "What color is the circle?",
    "Which bar is the tallest?", "Is there a red square?", "Where is the star?",
]  # fmt: skip
_OPTIONS: list[dict[str, Any]] = [
    {}, {}, {}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.2}, {"logit_bias": {"65": 2.0, "300": -3.0}},
    {"bad_words": ["the"]}, {"min_tokens": 4}, {"frequency_penalty": 0.3, "stop_token_ids": [13]},
]  # fmt: skip


@dataclass(slots=True)
class Case:
    """A prompt, and what it is answered."""

    question: str
    files: list[bytes]
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    answer: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether every form of a chat can say it."""
        return not self.options

    def urls(self, chance: random.Random) -> list[str]:
        """Of its pictures; now and then in files that were never seen, of the same pixels."""
        unseen = chance.random() < 0.3
        return [
            data_url(renamed(file, chance) if unseen and file.startswith(b"\x89PNG") else file) for file in self.files
        ]

    def body(self, path: str, chance: random.Random) -> dict[str, Any]:
        """The request in one endpoint's form."""
        urls = self.urls(chance)
        if path == CHAT:
            parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            message = {"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}
            return {"messages": [message], "max_tokens": self.max_tokens, "temperature": 0, **self.options}
        if path == RESPONSES:
            parts = [{"type": "input_image", "image_url": url} for url in urls]
            message = {"role": "user", "content": [*parts, {"type": "input_text", "text": self.question}]}
            return {"input": [message], "max_output_tokens": self.max_tokens, "temperature": 0}
        parts = [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}}
            for url in urls
        ]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}
        return {"model": "soak", "messages": [message], "max_tokens": self.max_tokens, "temperature": 0}


def make_cases(count: int, seed: int) -> list[Case]:
    """Two of three have pictures, some of them two."""
    chance = random.Random(seed)
    cases = []
    for number in range(count):
        pictures = [picture(chance.randrange(400)) for _ in range((0, 1, 1, 1, 2, 1)[number % 6])]
        question = chance.choice(_QUESTIONS) if pictures else talk(chance).question
        options = dict(chance.choice(_OPTIONS))
        cases.append(Case(question, pictures, chance.randint(6, 24), options))
    return cases
