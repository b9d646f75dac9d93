"""What every error must look like."""

from pathlib import Path
from typing import Any

import httpx

_ROOT = Path(__file__).parents[2]
_TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "service_unavailable_error"}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, its form checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"] == _TYPES.get(status, "invalid_request_error")
    assert all(error[key] is None or isinstance(error[key], str) for key in ("param", "code"))
    leaks = [
        text for text in ("Traceback", " at 0x", '.py"', "object at 0x", f"{_ROOT}/", "/tmp/") if text in response.text
    ]
    assert not leaks, response.text
    return error


def check_error(response: httpx.Response, param: str | None, *words: object, status: int = 400) -> dict[str, Any]:
    """An error about `param` whose message holds each of the words."""
    error = error_of(response, status)
    assert error["param"] == param, error
    for word in words:
        assert str(word) in error["message"], error
    return error


NOT_AVAILABLE_ANYWHERE: list[tuple[dict[str, Any], str]] = [
    ({"audio": {"voice": "x"}}, "audio"),
    ({"documents": [{"text": "x"}]}, "documents"),
    ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ({"logits_processors": ["x"]}, "logits_processors"),
    ({"media_io_kwargs": {"image": {}}}, "media_io_kwargs"),
    ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
    ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"web_search_options": {"a": 1}}, "web_search_options"),
    ({"detokenize": False}, "detokenize"),
    ({"early_stopping": True}, "early_stopping"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"verbosity": "low"}, "verbosity"),
    ({"best_of": 3}, "best_of"),
]
"""Fields that chat and responses know and refuse."""
