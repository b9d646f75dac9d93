"""What /openapi.json says of the endpoints is what they do."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from pydantic import create_model

from server.openapi import DescribedApp, describe_post
from server.response_types import Text
from tests.conftest import MakeCheckpoint
from tests.server.launch import Launch, user

KEY = "the-key"
LIMIT = 100_000

TAKES_JSON = {"200", "400", "401", "404", "413", "415", "503"}
GENERATES = TAKES_JSON | {"500"}
OPERATIONS = {
    ("get", "/health"): {"200", "503"},
    ("get", "/metrics"): {"200"},
    ("get", "/version"): {"200"},
    ("get", "/v1/models"): {"200", "401"},
    ("get", "/v1/models/{name}"): {"200", "401", "404"},
    ("post", "/v1/chat/completions"): GENERATES,
    ("post", "/v1/completions"): GENERATES,
    ("post", "/v1/responses"): GENERATES,
    ("get", "/v1/responses/{name}"): {"200", "400", "401", "404"},
    ("delete", "/v1/responses/{name}"): {"200", "401", "404"},
    ("post", "/v1/messages"): GENERATES,
    ("post", "/v1/messages/count_tokens"): TAKES_JSON,
    ("post", "/tokenize"): TAKES_JSON,
    ("post", "/detokenize"): TAKES_JSON,
}

LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
PARTS = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [user("Hi")], "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": [user(*PARTS)], "max_tokens": 2, "return_token_ids": True, "n": 2}),
    ("/v1/chat/completions", {"messages": [user("Hi")], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": [user("Hi")], "max_tokens": 2, "prompt_logprobs": 1}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "return_token_ids": True}),
    ("/v1/completions", {"prompt": [[1, 5], [1]], "max_tokens": 2, "prompt_logprobs": 1}),
    ("/v1/completions", {"prompt": ["Hi"], "max_tokens": 2, "logprobs": 2, "echo": True, "stop": ["a", "e"]}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
    ("/v1/responses", {"input": [user("Hi")], "max_output_tokens": 2, **LOGPROBS, "metadata": {"a": "b"}}),
    ("/v1/responses", {"input": "Hi", "stop": list("aeiou "), "instructions": "Be brief.", "tool_choice": "none"}),
    ("/v1/messages", {"model": "vlm", "messages": [user("Hi")], "max_tokens": 2}),
    ("/v1/messages", {"model": "vlm", "messages": [user(*PARTS)], "max_tokens": 99, "stop_sequences": ["a", "e"]}),
    ("/v1/messages/count_tokens", {"model": "vlm", "messages": [user(*PARTS)], "system": PARTS}),
    ("/tokenize", {"prompt": "Hi"}),
    ("/tokenize", {"messages": [user("Hi")], "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 5]}),
]
STREAMED = [
    (path, body)
    for path, body in BODIES
    if OPERATIONS["post", path] == GENERATES and not body.keys() & {"prompt_logprobs", "echo"}
]


@pytest.fixture(scope="module")
def client(launch: Launch, checkpoint: MakeCheckpoint) -> Iterator[httpx.Client]:
    """A client that has the key of a server that takes small bodies."""
    flags = ("--served-model-name", "vlm", "--api-key", KEY, "--max-request-bytes", str(LIMIT))
    with launch(checkpoint(), *flags).client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    whole = {**schema, "components": document["components"]}
    Draft202012Validator.check_schema(whole)
    Draft202012Validator(whole).validate(value)


def check_response(document: dict[str, Any], path: str, response: httpx.Response) -> None:
    """A JSON answer is as the description of its operation and status says."""
    operation = document["paths"][path][response.request.method.lower()]
    content = operation["responses"][str(response.status_code)]["content"]
    check(document, content[response.headers["content-type"]]["schema"], response.json())


def test_operations(document: dict[str, Any]) -> None:
    described = {
        (method, path): set(operation["responses"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert described == OPERATIONS


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                yield from references(child)

    found = set(references(document))
    assert "#/components/schemas/ImagePart" in found
    assert found <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_bodies_and_answers(client: httpx.Client, document: dict[str, Any], path: str, body: dict[str, Any]) -> None:
    check(document, document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"], body)
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    check_response(document, path, response)


def test_gets(client: httpx.Client, document: dict[str, Any]) -> None:
    for path in ("/version", "/v1/models"):
        check_response(document, path, client.get(path))
    check_response(document, "/v1/models/{name}", client.get("/v1/models/vlm"))
    described = document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert client.get("/metrics").headers["content-type"].partition(";")[0] in described
    assert client.get("/health").content == b""
    assert "content" not in document["paths"]["/health"]["get"]["responses"]["200"]


def test_kept_responses(client: httpx.Client, document: dict[str, Any]) -> None:
    path = "/v1/responses/{name}"
    place = f"/v1/responses/{client.post('/v1/responses', json={'input': 'Hi', 'max_output_tokens': 2}).json()['id']}"
    wrong_key = {"headers": {"Authorization": "Bearer another"}}
    requests: list[tuple[str, dict[str, Any], int]] = [
        ("GET", {}, 200), ("GET", {"params": {"stream": "true"}}, 400), ("GET", wrong_key, 401),
        ("DELETE", wrong_key, 401), ("DELETE", {}, 200), ("DELETE", {}, 404), ("GET", {}, 404),
    ]  # fmt: skip
    for method, options, status in requests:
        response = client.request(method, place, **options)
        assert response.status_code == status, response.text
        check_response(document, path, response)


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "post"])
def test_errors(client: httpx.Client, document: dict[str, Any], path: str) -> None:
    kind = {"Content-Type": "application/json"}
    requests: list[tuple[int, dict[str, Any]]] = [
        (400, {"content": b"{", "headers": kind}),
        (401, {"content": b"{}", "headers": {"Authorization": "Bearer another", **kind}}),
        (404, {"json": dict(next(body for at, body in BODIES if at == path), model="another")}),
        (413, {"content": b" " * (LIMIT + 1), "headers": kind}),
        (415, {"content": b"{}", "headers": {"Content-Type": "text/plain"}}),
    ]
    for status, request in requests:
        response = client.post(path, **request)
        assert response.status_code == status, response.text
        check_response(document, path, response)


@pytest.mark.parametrize(("path", "body"), STREAMED)
def test_events(client: httpx.Client, document: dict[str, Any], path: str, body: dict[str, Any]) -> None:
    schema = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    described = schema["properties"]["data"]
    schema = described.get("anyOf", [described])[0]["contentSchema"]
    response = client.post(path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    found = [json.loads(data) for data in re.findall(r"^data: (?!\[DONE\]$)(.*)$", response.text, flags=re.MULTILINE)]
    assert found and not any("error" in event for event in found)
    for event in found:
        check(document, schema, event)


def test_no_other_streams_are_described(document: dict[str, Any]) -> None:
    described = {
        path
        for path, methods in document["paths"].items()
        for operation in methods.values()
        if "text/event-stream" in operation["responses"]["200"].get("content", {})
    }
    assert described == {path for path, _ in STREAMED}


def test_two_types_of_one_name_are_not_mixed_up() -> None:
    app = DescribedApp()
    for path, kind in (("/a", int), ("/b", str)):
        body = create_model("Body", field=kind)
        app.post(path, openapi_extra=describe_post(body, answer=Text))(lambda: None)
    with pytest.raises(ValueError, match="named Body"):
        app.openapi()


def test_key_is_asked_for_where_401_may_come(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            wanted = [{"bearer": []}, {"x-api-key": []}] if "401" in operation["responses"] else None
            assert operation.get("security") == wanted, path
    assert document["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
