"""Requests that are wrong, each with the status that it must be answered with."""

from typing import Any

from tests.soak.cases import CHAT, COMPLETIONS, MESSAGES, RESPONSES

JSON = "application/json"
Mistake = tuple[int, str, str, Any, str]
"""Status, method, path, body (bytes are sent as they are), content type."""

_HELLO = [{"role": "user", "content": "Hello"}]


def _picture(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


_FIELDS: list[dict[str, Any]] = [
    {"temperature": -1}, {"temperature": "hot"}, {"top_p": 2}, {"top_k": -7}, {"min_p": 1.5}, {"n": 0},
    {"max_tokens": 0}, {"max_tokens": 1 << 40}, {"max_tokens": "few"}, {"stop": [""]}, {"presence_penalty": 9},
    {"repetition_penalty": 0}, {"logit_bias": {"999999": 1}}, {"logit_bias": {"x": 1}}, {"top_logprobs": 3},
    {"logprobs": True, "top_logprobs": 99}, {"allowed_token_ids": []}, {"stop_token_ids": [-1]},
    {"response_format": {"type": "xml"}}, {"stream_options": {"include_usage": True}},
    {"prompt_logprobs": -5}, {"messages": []}, {"messages": "Hello"}, {"messages": [{"role": "king", "content": "x"}]},
    {"messages": [{"role": "user", "content": "word " * 9000}]}, {"chat_template_kwargs": {"tools": 1}},
    {"chat_template": "{{ 1 }}"}, {"store": True}, {"min_tokens": 5, "max_tokens": 2}, {"functions": [{}]},
]  # fmt: skip
_URLS = [
    "ftp://host/x.png", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "http://[::1]/", "data:text/plain,x",
    "data:image/png;base64,????", "data:image/png;base64,AAAA", "data:image/png;base64,", "no url", "",
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB",
]  # fmt: skip

_BODIES: list[Any] = [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": ' + b"[" * 5000, {}]

MISTAKES: list[Mistake] = [
    *((400, "POST", CHAT, {"messages": _HELLO, **fields}, JSON) for fields in _FIELDS),
    *((400, "POST", CHAT, _picture(url), JSON) for url in _URLS),
    *((400, "POST", path, body, JSON) for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
      for body in _BODIES),
    *((404, "POST", path, {"model": "absent", "messages": _HELLO, "input": "x", "prompt": "x", "max_tokens": 1}, JSON)
      for path in (CHAT, COMPLETIONS, RESPONSES)),
    (400, "POST", COMPLETIONS, {"prompt": [1 << 30]}, JSON),
    (400, "POST", COMPLETIONS, {"prompt": []}, JSON),
    (400, "POST", RESPONSES, {"input": "Hello", "tools": [{}]}, JSON),
    (400, "POST", MESSAGES, {"model": "soak", "messages": _HELLO}, JSON),
    (400, "POST", "/detokenize", {"tokens": [-1]}, JSON),
    (404, "GET", "/v1/responses/resp_absent", None, JSON),
    (404, "GET", "/v1/nothing", None, JSON),
    (404, "GET", "/v1/models/absent", None, JSON),
    (405, "GET", CHAT, None, JSON),
    (405, "DELETE", "/tokenize", None, JSON),
    (415, "POST", CHAT, b"messages=Hello", "application/x-www-form-urlencoded"),
]  # fmt: skip
