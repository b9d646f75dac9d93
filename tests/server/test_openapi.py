"""What /openapi.json says of the endpoints is what they do."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.conftest import MakeCheckpoint
from tests.server.launch import Launch, user

KEY = "the-key"
LIMIT = 100_000

TAKES_JSON = {"200", "400", "401", "404", "413", "415", "503"}
OPERATIONS = {
    ("get", "/health"): {"200", "503"},
    ("get", "/metrics"): {"200"},
    ("get", "/version"): {"200"},
    ("get", "/v1/models"): {"200", "401"},
    ("get", "/v1/models/{name}"): {"200", "401", "404"},
    ("post", "/v1/chat/completions"): TAKES_JSON | {"500"},
    ("post", "/v1/completions"): TAKES_JSON | {"500"},
    ("post", "/tokenize"): TAKES_JSON,
    ("post", "/detokenize"): TAKES_JSON,
}

PARTS = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [user("Hi")], "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": [user(*PARTS)], "max_tokens": 2, "return_token_ids": True, "n": 2}),
    ("/v1/chat/completions", {"messages": [user("Hi")], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": [user("Hi")], "max_tokens": 2, "prompt_logprobs": 1}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "return_token_ids": True}),
    ("/v1/completions", {"prompt": [[1, 5], [1]], "max_tokens": 2, "prompt_logprobs": 1}),
    ("/v1/completions", {"prompt": ["Hi"], "max_tokens": 2, "logprobs": 2, "echo": True, "stop": ["a", "e"]}),
    ("/tokenize", {"prompt": "Hi"}),
    ("/tokenize", {"messages": [user("Hi")], "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 5]}),
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


def test_streams_are_described_by_their_events(document: dict[str, Any]) -> None:
    for path, event in (("/v1/chat/completions", "ChatCompletionChunk"), ("/v1/completions", "CompletionChunk")):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert content["text/event-stream"]["schema"]["$ref"] == f"#/components/schemas/{event}"


def test_key_is_asked_for_where_401_may_come(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation.get("security") == ([{"bearer": []}] if "401" in operation["responses"] else None), path
    assert document["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
