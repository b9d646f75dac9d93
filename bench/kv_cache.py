"""Compares the answers of an fp8 KV cache with those of the model's own type.

    python -m bench.kv_cache [--model MODEL] [--device cpu] [--max-tokens 64]

Every question is asked about every sample picture of the demo model, or about none where the model does not see.
"""

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams
from engine.args import EngineArgs
from engine.outputs import RequestOutput
from server.args import add_flag, with_dashes

_SAMPLES = Path(__file__).parent.parent / "demo" / "samples"
_QUESTIONS = (
    "What is in the picture?",
    "Describe the picture.",
    "What does it say?",
    "What color is the largest thing?",
    "How many things are there?",
    "What is at the top left?",
    "Which is the smallest?",
    "Is there a dog in the picture?",
)


@dataclass(frozen=True, slots=True)
class Differences:
    """Between the log probabilities that the two caches give to the same tokens, without sign."""

    tokens: int
    mean: float
    largest: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of the two caches' answers to the same prompts, and of what they make of these prompts."""

    prompts: int
    of_prompts: Differences
    """Without what stands for pictures."""
    of_answers: Differences
    """Before the first token that is not the same."""
    equal_answers: float
    """Share."""
    mean_equal_tokens: float
    """With which two answers begin."""
    mean_answer_tokens: float
    """Of the exact cache's."""


def compare(exact: list[RequestOutput], rounded: list[RequestOutput], image_token: int | None) -> Comparison:
    """Two runs of the same prompts, with `prompt_logprobs` and `logprobs`."""
    in_prompts, in_answers, equal = list[float](), list[float](), 0
    for one, other in zip(exact, rounded, strict=True):
        tables = zip(one.prompt_token_ids, one.prompt_logprobs or [], other.prompt_logprobs or [], strict=True)
        in_prompts += [
            abs(a[token].logprob - b[token].logprob) for token, a, b in tables if a and b and token != image_token
        ]
        first, second = one.outputs[0], other.outputs[0]
        pairs = zip(first.token_ids, second.token_ids, strict=False)
        same = [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        answered = zip(same, first.logprobs or [], second.logprobs or [], strict=False)
        in_answers += [abs(a[token].logprob - b[token].logprob) for token, a, b in answered]
        equal += first.token_ids == second.token_ids
    return Comparison(
        prompts=len(exact),
        of_prompts=_differences(in_prompts),
        of_answers=_differences(in_answers),
        equal_answers=equal / len(exact),
        mean_equal_tokens=len(in_answers) / len(exact),
        mean_answer_tokens=sum(len(output.outputs[0].token_ids) for output in exact) / len(exact),
    )


def _differences(found: list[float]) -> Differences:
    return Differences(len(found), sum(found) / max(1, len(found)), max(found, default=0.0))


def answer(flags: dict[str, Any], kv_cache_dtype: str, max_tokens: int) -> tuple[list[RequestOutput], int | None]:
    """Of every prompt, with such a cache; and the token that stands for a part of a picture."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, prompt_logprobs=0, logprobs=0)
    with LLM(**flags | {"kv_cache_dtype": kv_cache_dtype}) as llm:
        vision = llm.config.vision
        pictures = [] if vision is None else sorted(_SAMPLES.iterdir())
        shown = [[{"type": "image", "image": str(picture)}] for picture in pictures] or [[]]
        conversations = [
            [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
            for parts, question in itertools.product(shown, _QUESTIONS)
        ]
        return llm.chat(conversations, params), None if vision is None else vision.image_token_id


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.kv_cache", description="Compare an fp8 KV cache.")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer (default: 64)")
    for flag in EngineArgs.flags():
        if flag.name != "kv_cache_dtype":
            add_flag(parser, flag)
    args = parser.parse_args([with_dashes(word) for word in sys.argv[1:]])
    flags = vars(args)
    max_tokens = flags.pop("max_tokens")
    try:
        exact, image_token = answer(flags, "auto", max_tokens)
        rounded, _ = answer(flags, "fp8", max_tokens)
    except ValueError as error:
        sys.exit(f"error: {error}")
    found = compare(exact, rounded, image_token)
    for name, some in (("prompts", found.of_prompts), ("answers", found.of_answers)):
        print(
            f"{found.prompts} {name}: log probabilities of {some.tokens} tokens differ by {some.mean:.4f} on average, "
            f"{some.largest:.3f} at most"
        )
    print(
        f"{found.equal_answers:.0%} of the greedy answers are equal; {found.mean_equal_tokens:.1f} of "
        f"{found.mean_answer_tokens:.1f} tokens are before the first difference"
    )


if __name__ == "__main__":
    main()
