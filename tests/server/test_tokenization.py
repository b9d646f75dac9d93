"""`POST /tokenize` and `POST /detokenize`."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conftest import MakeCheckpoint
from tests.oracle import hf_prompt_ids
from tests.server.errors import check_error, error_of
from tests.server.launch import Server, assistant, data_url, image_part, text_part, user

TEXTS = ["Hello there!", "Grüße an 東京 🌸", "", "  two  spaces\n\tand lines", "USER: a </s> b"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [False, True])
def test_text(server: Server, checkpoint: MakeCheckpoint, text: str, special: bool) -> None:
    reply = server.post("/tokenize", {"prompt": text, "add_special_tokens": special, "model": "vlm"}).json()
    expected = AutoTokenizer.from_pretrained(checkpoint())(text, add_special_tokens=special)["input_ids"]
    assert reply["tokens"] == expected
    assert (reply["count"], reply["max_model_len"]) == (len(expected), 2048)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(server: Server, checkpoint: MakeCheckpoint, text: str) -> None:
    tokens = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    reply = server.post("/detokenize", {"tokens": tokens}).json()
    assert reply == {"prompt": AutoTokenizer.from_pretrained(checkpoint()).decode(tokens)}
    assert reply["prompt"].lstrip() == text.lstrip()  # the tokenizer itself loses a space at the beginning


def test_token_strings(server: Server) -> None:
    reply = server.post("/tokenize", {"prompt": "image", "return_token_strs": True}).json()
    assert reply["token_strs"] == ["<s>", "▁image"]
    assert server.post("/tokenize", {"prompt": "image"}).json()["token_strs"] is None


def test_chat(server: Server, checkpoint: MakeCheckpoint, photo_files: list[Path]) -> None:
    picture = image_part(data_url(photo_files[0]))
    messages: list[dict[str, Any]] = [
        user(text_part("Look."), picture),
        assistant("I see."),
        user(picture, text_part("And now?"), picture),
    ]
    reply = server.post("/tokenize", {"messages": messages}).json()
    assert reply["tokens"] == hf_prompt_ids(checkpoint(), messages)
    assert reply["tokens"].count(700) == 3 * 16
    response = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json()
    assert reply["count"] == response["usage"]["prompt_tokens"]
    assert response["usage"]["prompt_tokens_details"]["image_tokens"] == 48


def test_chat_fields(server: Server) -> None:
    def tokens(**fields: Any) -> list[int]:
        found: list[int] = server.post("/tokenize", {"messages": [user("Hi")], **fields}).json()["tokens"]
        return found

    plain = tokens()
    assert tokens(add_special_tokens=False) == plain[1:]
    assert tokens(add_generation_prompt=False) == plain[:-1] + tokens(add_generation_prompt=False)[-1:]
    assert tokens(add_generation_prompt=False) != plain


def test_detokenize_keeps_special_tokens(server: Server) -> None:
    assert server.post("/detokenize", {"tokens": [1, 2]}).json() == {"prompt": "<s></s>"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_errors(server: Server) -> None:
    for tokens in ([-1], [5, 704], [2**70]):
        check_error(server.post("/detokenize", {"tokens": tokens}), "tokens", tokens[-1], 703)
    check_error(server.post("/detokenize", {"tokens": ["1"]}), "tokens.0", "integer", "'1'")
    check_error(server.post("/detokenize", {}), "tokens", "required")
    check_error(server.post("/tokenize", {}), "prompt", "required")
    check_error(server.post("/tokenize", {"prompt": 5}), "prompt", "string", 5)
    check_error(server.post("/tokenize", {"prompt": "a typed <image>"}), "prompt", "<image>")
    check_error(server.post("/tokenize", {"messages": []}), "messages", 1)
    check_error(server.post("/tokenize", {"messages": [user("<image>")]}), "messages", "<image>")
    check_error(server.post("/tokenize", {"messages": [user("x")], "chat_template": "x"}), "chat_template", "allowed")
    many = [user(*[image_part("data:image/png;base64,AAAA")] * 129)]
    check_error(server.post("/tokenize", {"messages": many}), "messages", 129, 128)
    check_error(server.post("/tokenize", {"prompt": "x", "model": "other"}), "model", "'other'", status=404)
    check_error(server.post("/tokenize", [1]), None)
    error_of(server.get("/tokenize"), 405)
