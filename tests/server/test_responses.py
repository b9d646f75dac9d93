"""`/v1/responses` as OpenAI's client and as a plain one see it."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from server import responses_answer
from server.response_store import ResponseStore, StoredResponse
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec
from tests.server.errors import NOT_AVAILABLE_ANYWHERE, check_error, error_of
from tests.server.launch import Launch, Server, assistant, data_url, image_part, text_part, user

PATH, CHAT = "/v1/responses", "/v1/chat/completions"
LONG = CheckpointSpec(max_position_embeddings=16384)
QUESTION = "Tell me a story about the sea, please."
RUNNING = "vllm:num_requests_running"
LOGPROBS = "message.output_text.logprobs"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def server(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    return launch(checkpoint(LONG), "--served-model-name", "vlm", "--limit-mm-per-prompt", "image=4")


@pytest.fixture(scope="module")
def locked(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    """Asks for a key, and takes few bytes."""
    return launch(checkpoint(LONG), "--api-key", "one", "two", "--max-request-bytes", "5000")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def create(server: Server, given: Any = QUESTION, **fields: Any) -> httpx.Response:
    return server.post(PATH, {"temperature": 0, "max_output_tokens": 12, "input": given} | fields)


def answer(server: Server, given: Any = QUESTION, **fields: Any) -> Response:
    """A response whose form was checked."""
    found = create(server, given, **fields)
    assert found.status_code == 200, found.text
    return Response.model_validate(found.json(), strict=True)


def events(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream whose framing, numbers and forms were checked."""
    found = create(server, stream=True, **fields)
    assert found.status_code == 200, found.text
    assert found.headers["content-type"].startswith("text/event-stream")
    blocks = found.text.split("\n\n")
    assert blocks.pop() == ""
    told = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        assert EVENT.validate_python(event, strict=True).type == event["type"]
        told.append(event)
    return told


def chat(server: Server, messages: list[Any], **fields: Any) -> tuple[str, int]:
    """The text that a chat gives, and the tokens of its prompt."""
    found = server.post(CHAT, {"temperature": 0, "max_tokens": 12, "messages": messages} | fields)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["message"]["content"], found.json()["usage"]["prompt_tokens"]


def outcome(response: Response) -> tuple[str, int]:
    assert response.usage is not None
    return response.output_text, response.usage.input_tokens


def test_form_of_a_response(server: Server) -> None:
    fields = {"instructions": "Be brief.", "metadata": {"a": "b"}, "user": "me", "top_p": 0.5,
              "prompt_cache_key": "k", "safety_identifier": "s"}  # fmt: skip
    body = create(server, **fields, parallel_tool_calls=False, temperature=0.5).json()
    (message,) = body["output"]
    assert body["id"].startswith("resp_") and message["id"].startswith("msg_")
    assert message.keys() == {"id", "type", "role", "status", "content"}
    (part,) = message["content"]
    assert part == {"type": "output_text", "text": part["text"], "annotations": [], "logprobs": []}
    assert body.items() >= fields.items()
    assert body.items() >= {
        "object": "response", "model": "vlm", "status": "incomplete", "error": None, "max_output_tokens": 12,
        "incomplete_details": {"reason": "max_output_tokens"}, "parallel_tool_calls": False, "store": True,
        "previous_response_id": None, "temperature": 0.5, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
        "tools": [], "truncation": "disabled", "background": False, "completed_at": None, "top_logprobs": 0,
        "reasoning": {"effort": None, "summary": None},
    }.items()  # fmt: skip
    usage = body["usage"]
    assert usage["output_tokens"] == 12 and usage["total_tokens"] == usage["input_tokens"] + 12
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    assert usage["input_tokens_details"].keys() == {"cached_tokens", "cache_write_tokens", "image_tokens"}
    assert message["status"] == "incomplete" and Response.model_validate(body, strict=True)


def test_a_response_that_ends_by_itself(server: Server) -> None:
    whole = answer(server).output_text
    response = answer(server, stop=whole[5:8])
    assert response.output_text == whole[: whole.index(whole[5:8])]
    assert response.status == "completed" and response.incomplete_details is None
    assert response.completed_at is not None and response.completed_at >= response.created_at
    assert response.output[0].type == "message" and response.output[0].status == "completed"


def test_it_is_the_chat(server: Server, photo_files: list[Path]) -> None:
    url = data_url(photo_files[0])
    given = [
        {"role": "user", "content": QUESTION},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "No."}]},
        {"role": "user", "content": [
            {"type": "input_text", "text": "And this?"}, {"type": "input_image", "image_url": url, "detail": "auto"},
        ]},
    ]  # fmt: skip
    same = [user(QUESTION), assistant("No."), user(text_part("And this?"), image_part(url))]
    response = answer(server, given)
    assert outcome(response) == chat(server, same)
    assert response.usage is not None
    assert response.usage.input_tokens_details.model_dump()["image_tokens"] > 0
    system = {"role": "system", "content": "Be brief."}
    assert outcome(answer(server, given, instructions="Be brief.")) == chat(server, [system, *same])
    assert outcome(answer(server, [{"role": "developer", "content": "Be brief."}, *given])) == chat(
        server, [{"role": "developer", "content": "Be brief."}, *same]
    )
    assert outcome(answer(server, instructions="")) == chat(server, [user(QUESTION)])


STREAMED: list[dict[str, Any]] = [
    {},
    {"include": [LOGPROBS], "top_logprobs": 2},
    {"stop": "e", "max_output_tokens": 64},
    {"temperature": 5, "seed": 3, "max_output_tokens": 100, "include": [LOGPROBS]},
]


@pytest.mark.parametrize("fields", STREAMED, ids=json.dumps)
def test_joined_stream_is_the_plain_response(server: Server, fields: dict[str, Any]) -> None:
    plain = create(server, **fields).json()
    created, in_progress, item_added, part_added, *deltas, text_done, part_done, item_done, last = events(
        server, **fields
    )
    types = [event["type"].removeprefix("response.") for event in (created, in_progress, item_added, part_added)]
    assert types == ["created", "in_progress", "output_item.added", "content_part.added"]
    types = [event["type"].removeprefix("response.") for event in (text_done, part_done, item_done, last)]
    assert types == ["output_text.done", "content_part.done", "output_item.done", plain["status"]]
    assert {event["type"] for event in deltas} == {"response.output_text.delta"}
    for event in (created, in_progress):
        assert event["response"]["status"] == "in_progress" and event["response"]["output"] == []
        assert event["response"]["id"] == last["response"]["id"]

    (message,), (wanted,) = last["response"]["output"], plain["output"]
    (part,), (wanted_part,) = message["content"], wanted["content"]
    assert part["text"] == wanted_part["text"] == "".join(event["delta"] for event in deltas)
    assert (item_done["item"], part_done["part"], text_done["text"]) == (message, part, part["text"])
    assert part["logprobs"] == [entry for event in deltas for entry in event["logprobs"]] == text_done["logprobs"]
    assert [entry["token"] for entry in part["logprobs"]] == [entry["token"] for entry in wanted_part["logprobs"]]
    assert item_added["item"] == message | {"status": "in_progress", "content": []}
    assert part_added["part"] == part | {"text": "", "logprobs": []}
    assert {event["item_id"] for event in (part_added, *deltas, text_done, part_done)} == {message["id"]}
    varying = {"id", "created_at", "completed_at", "output", "usage"}
    assert {k: v for k, v in last["response"].items() if k not in varying} == {
        k: v for k, v in plain.items() if k not in varying
    }
    assert last["response"]["usage"]["total_tokens"] == plain["usage"]["total_tokens"]


def test_logprobs(server: Server) -> None:
    (message,) = create(server, include=[LOGPROBS], top_logprobs=3).json()["output"]
    (part,) = message["content"]
    assert len(part["logprobs"]) == 12
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    assert bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode() == part["text"]
    assert all(len(entry["top_logprobs"]) == 3 for entry in part["logprobs"])


def test_openai_client(client: OpenAI, server: Server) -> None:
    options: Any = {"model": "vlm", "input": QUESTION, "temperature": 0, "max_output_tokens": 64}
    extra = {"extra_body": {"stop": ["e"]}}
    first = client.responses.create(**options, **extra)
    text = ""
    for event in client.responses.create(**options, **extra, stream=True):
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == first.output_text != ""
    with client.responses.stream(**options, **extra) as stream:
        assert [event.type for event in stream][-1] == "response.completed"
        assert stream.get_final_response().output_text == text
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()

    again: Any = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "And then?"}]
    by_hand = client.responses.create(**options | {"input": again})
    chained = client.responses.create(**options | {"input": "And then?"}, previous_response_id=first.id)
    assert chained.previous_response_id == first.id
    assert by_hand.output_text == chained.output_text

    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as missing:
        client.responses.create(**options, previous_response_id=chained.id)
    assert (missing.value.code, missing.value.param) == ("previous_response_not_found", "previous_response_id")


def test_chains_are_the_same_conversation(server: Server, photo_files: list[Path]) -> None:
    pictures = [data_url(file) for file in photo_files]
    messages: list[Any] = []
    previous: dict[str, Any] = {}
    for number, url in enumerate([pictures[0], None, pictures[1], None]):
        question = f"Question {number}?"
        image = [] if url is None else [{"type": "input_image", "image_url": url}]
        given = [{"role": "user", "content": [*image, {"type": "input_text", "text": question}]}]
        messages.append(user(*([] if url is None else [image_part(url)]), text_part(question)))
        # Instructions are those of one request alone, and come first.
        system = [{"role": "system", "content": "Be brief."}] if number == 2 else []
        fields = previous | ({"instructions": "Be brief."} if system else {})
        wanted = chat(server, [*system, *messages])
        response = answer(server, given, **fields)
        assert outcome(response) == wanted
        last = events(server, **fields, given=given)[-1]["response"]
        assert last["output"][0]["content"][0]["text"] == wanted[0]
        previous = {"previous_response_id": (response.id, last["id"])[number % 2]}
        messages.append(assistant(wanted[0]))


def test_kept_responses(server: Server) -> None:
    body = create(server, metadata={"a": "ü"}).json()
    found = server.get(f"{PATH}/{body['id']}")
    assert found.json() == body and found.headers["content-type"] == "application/json"
    assert server.get(f"{PATH}/{body['id']}", params={"stream": "false"}).json() == body
    for query in ({"stream": "true"}, {"include[]": LOGPROBS}, {"starting_after": "1"}):
        check_error(server.get(f"{PATH}/{body['id']}", params=query), next(iter(query)).removesuffix("[]"))
    last = events(server)[-1]["response"]
    assert server.get(f"{PATH}/{last['id']}").json() == last
    with server.client() as plain:
        gone = plain.delete(f"{PATH}/{body['id']}")
        assert gone.json() == {"id": body["id"], "object": "response", "deleted": True}
        check_error(plain.delete(f"{PATH}/{body['id']}"), "response_id", body["id"], status=404)
    check_error(server.get(f"{PATH}/{body['id']}"), "response_id", body["id"], status=404)


def test_responses_that_are_not_kept(server: Server) -> None:
    kept = answer(server)
    for fields in ({}, {"previous_response_id": kept.id}):
        response = answer(server, store=False, **fields)
        assert response.model_dump()["store"] is False
        check_error(server.get(f"{PATH}/{response.id}"), "response_id", response.id, status=404)
        error = check_error(create(server, previous_response_id=response.id), "previous_response_id", response.id)
        assert error["code"] == "previous_response_not_found"
    streamed = events(server, store=False)[-1]["response"]["id"]
    check_error(server.get(f"{PATH}/{streamed}"), "response_id", streamed, status=404)


def test_messages_of_one_role_that_follow_each_other_are_one_turn(server: Server) -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be kind."}]
    asked = [{"role": "user", "content": "Hi."}, {"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}]
    found = outcome(answer(server, [*said, *asked], instructions="Be good."))
    texts = [[text_part(text) for text in turn] for turn in (["Be good.", "Be brief.", "Be kind."], ["Hi.", "Who?"])]
    system, question = ({"role": role, "content": t} for role, t in zip(("system", "user"), texts, strict=True))
    assert found == chat(server, [system, question])


def test_limits_hold_for_the_whole_conversation(server: Server, photo_files: list[Path]) -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")] * 350
    first = answer(server, turns[:699], max_output_tokens=1)
    found = create(server, turns[:323], previous_response_id=first.id, max_output_tokens=1)
    assert found.status_code == 200, found.text  # 699, an answer, 323: nearly as many as there may be
    check_error(create(server, turns[:325], previous_response_id=first.id), "input", 1024)
    (picture,) = image(image_url=data_url(photo_files[0]))[0]["content"]
    pictures = answer(server, [{"role": "user", "content": [picture] * 3}], max_output_tokens=1)
    two_more = [{"role": "user", "content": [picture] * 2}]
    check_error(create(server, two_more, previous_response_id=pictures.id), "input", 5, 4)
    long = answer(server, "long " * 3000, max_output_tokens=1)
    check_error(create(server, "long " * 3000, previous_response_id=long.id), "input", 16384)


def image(**fields: Any) -> list[Any]:
    return [{"role": "user", "content": [{"type": "input_image", **fields}]}]


BAD_FIELDS: list[tuple[dict[str, Any], str, tuple[object, ...]]] = [
    ({"input": 5}, "input", ("array", 5)),
    ({"input": None}, "input", ("array", None)),
    ({"input": []}, "input", (1, 0)),
    ({"input": [{"role": "user", "content": "a"}] * 1025}, "input", (1024,)),
    ({"input": ["a"]}, "input.0", ()),
    ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role", ("'user'", "'tool'")),
    ({"input": [{"role": "user"}]}, "input.0.content", ("required",)),
    ({"input": [{"role": "user", "content": "a"}, {"type": "function_call", "name": "f", "arguments": "{}"}]},
     "input.1.type", ("'message'", "'function_call'")),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", ("'item_reference'",)),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
     "input.0.content.0.type", ("'input_image'", "'input_file'")),
    ({"input": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
     "input.0.content.0.type", ("'input_text'", "'text'")),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text", ("required",)),
    ({"input": image(file_id="file-1")}, "input.0.content.0.file_id", ("file-1",)),
    ({"input": image()}, "input.0.content.0.image_url", ("required",)),
    ({"input": image(image_url={"url": "x"})}, "input.0.content.0.image_url", ("string",)),
    ({"input": image(image_url="x", detail="original")}, "input.0.content.0.detail", ("'auto'", "'original'")),
    ({"input": image(image_url="data:image/png;base64,AAAA")}, "input", ("PNG",)),
    ({"input": [{**image(image_url="x")[0], "role": "assistant"}]}, "input", ("assistant", "images")),
    ({"input": "a <image> b"}, "input", ("<image>",)),
    ({"input": "long " * 20000}, "input", (16384,)),
    ({"instructions": ["x"]}, "instructions", ("string",)),
    ({"instructions": "An <image>."}, "instructions", ("<image>",)),
    ({"input": "An <image>."}, "input", ("<image>",)),
    ({"max_output_tokens": 0}, "max_output_tokens", ("max_output_tokens", 0, 1)),
    ({"max_output_tokens": 20000}, "max_output_tokens", ("max_output_tokens", 20000, 16384)),
    ({"min_tokens": 30}, "min_tokens", (30, "max_output_tokens", 12)),
    ({"temperature": -1}, "temperature", (-1, 0)),
    ({"top_p": 2}, "top_p", (2, 1)),
    ({"top_logprobs": 2}, "top_logprobs", ("include",)),
    ({"top_logprobs": 21, "include": [LOGPROBS]}, "top_logprobs", (21, 20)),
    ({"metadata": {"a": 5}}, "metadata.a", ("string", 5)),
    ({"metadata": {"a": "x" * 513}}, "metadata.a", (512,)),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", (16,)),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options", ("stream",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "words"), BAD_FIELDS, ids=lambda value: json.dumps(value, default=str)[:60]
)
def test_bad_fields(server: Server, fields: dict[str, Any], param: str, words: tuple[object, ...]) -> None:
    check_error(create(server, **fields), param, *words)


FUNCTION = {"type": "function", "name": "f", "parameters": {}}
NOT_AVAILABLE: list[tuple[dict[str, Any], str]] = [
    ({"background": True}, "background"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"include": ["reasoning.encrypted_content"]}, "include"),
    ({"include": [LOGPROBS, "file_search_call.results"]}, "include"),
    ({"max_tokens": 5}, "max_tokens"),
    *NOT_AVAILABLE_ANYWHERE,
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"max_tool_calls": 5}, "max_tool_calls"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"n": 2}, "n"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"text": {"format": {}}}, "text.format"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"tools": [FUNCTION]}, "tools"),
    ({"tools": [FUNCTION], "tool_choice": "none"}, "tools"),
    ({"truncation": "auto"}, "truncation"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"response_format": {"type": "structural_tag"}}, "response_format"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"functions": [{"name": "f"}]}, "functions"),
]


@pytest.mark.parametrize(("fields", "param"), NOT_AVAILABLE, ids=lambda value: json.dumps(value)[:60])
def test_what_is_not_available_says_so(server: Server, fields: dict[str, Any], param: str) -> None:
    check_error(create(server, **fields), param, "not available", param)


@pytest.mark.parametrize("described", [[1], "x", {"schema": 5}, None])
def test_a_schema_that_is_not_used_may_be_anything(server: Server, described: Any) -> None:
    response = answer(server, response_format={"type": "text", "json_schema": described})
    assert response.text is not None and response.text.format is not None and response.text.format.type == "text"


def test_fields_without_effect(server: Server) -> None:
    fields = {
        "background": False, "tools": [], "tool_choice": "none", "truncation": "disabled", "n": 1, "include": [],
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "reasoning": {"effort": "none", "summary": None},
        "service_tier": "auto", "stream": None, "store": None, "metadata": None, "an_unknown_field": {"x": 1},
        "top_logprobs": 0, "user": "me", "prompt_cache_retention": "in_memory", "stream_options": None,
    }  # fmt: skip
    response = answer(server, **fields)
    assert outcome(response) == outcome(answer(server))
    assert response.tool_choice == "none" and server.get(f"{PATH}/{response.id}").status_code == 200


def test_other_errors(server: Server, client: OpenAI) -> None:
    check_error(create(server, model="nothing"), "model", "'nothing'", status=404)
    check_error(create(server, stream=True, temperature=-1), "temperature", -1)
    check_error(server.post(PATH, {}), "input", "required")
    check_error(create(server, previous_response_id="resp_x"), "previous_response_id", "'resp_x'")
    error_of(server.get(PATH), 405)
    with pytest.raises(openai.BadRequestError) as bad:
        list(client.responses.create(model="vlm", input="x", stream=True, truncation="auto"))
    assert bad.value.param == "truncation"


LONGEST = {"input": "Hi", "max_output_tokens": 16000, "ignore_eos": True}


def check_nothing_runs(server: Server) -> None:
    server.wait_for_metric(RUNNING, lambda value: value == 0)
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_a_client_that_leaves_a_stream(server: Server) -> None:
    with server.client() as plain, plain.stream("POST", PATH, json=LONGEST | {"stream": True}) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number > 30:
                assert server.metric(RUNNING) == 1
                break
    check_nothing_runs(server)


def test_a_client_that_leaves_before_its_answer(server: Server) -> None:
    with server.client() as plain, ThreadPoolExecutor() as pool:
        asking = pool.submit(plain.post, PATH, json=LONGEST, timeout=1)
        server.wait_for_metric(RUNNING, lambda value: value == 1)
        with pytest.raises(httpx.ReadTimeout):
            asking.result()
    check_nothing_runs(server)


def test_keys_and_bytes(locked: Server) -> None:
    def ask(method: str, path: str, key: str, *, header: str = "Authorization", **fields: Any) -> httpx.Response:
        body = {"input": "Hi", "max_output_tokens": 1} | fields if method == "POST" else None
        with locked.client(headers={header: f"Bearer {key}" if header == "Authorization" else key}) as plain:
            return plain.request(method, path, json=body)

    error_of(ask("POST", PATH, "three"), 401)
    made = ask("POST", PATH, "one", input="a" * 3000).json()
    place = f"{PATH}/{made['id']}"
    error_of(ask("GET", place, "three"), 401)
    check_error(ask("GET", place, "two"), "response_id", status=404)
    check_error(ask("DELETE", place, "two"), "response_id", status=404)
    refused = check_error(ask("POST", PATH, "two", previous_response_id=made["id"]), "previous_response_id")
    assert refused["code"] == "previous_response_not_found"
    assert ask("GET", place, "one").json() == ask("GET", place, "one", header="x-api-key").json() == made
    check_error(ask("GET", place, "two", header="x-api-key"), "response_id", status=404)
    assert ask("POST", PATH, "one", previous_response_id=made["id"]).status_code == 200
    error_of(ask("POST", PATH, "one", previous_response_id=made["id"], input="a" * 3000), 413)


def test_conversations_that_wait_for_their_grammars_keep_no_place(locked: Server) -> None:
    """One client continues with what never compiles; another just continues."""

    def ask(key: str, **fields: Any) -> httpx.Response:
        return locked.post(PATH, {"max_output_tokens": 2, **fields}, headers={"Authorization": f"Bearer {key}"})

    before = {key: ask(key, input="Hi").json()["id"] for key in ("one", "two")}
    done: list[str] = []

    def continue_with(number: int) -> None:
        schema = {"type": "integer", "multipleOf": 99_999_989 - 2 * number}
        form = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
        assert ask("one", input="x", previous_response_id=before["one"], text=form).status_code == 400
        done.append("one")

    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(continue_with, number) for number in range(6)]
        time.sleep(0.3)
        answer = ask("two", input="y", previous_response_id=before["two"])
        done.append("two")
        for task in waiting:
            task.result()
    assert answer.status_code == 200 and done.index("two") <= 1


def test_an_engine_that_dies(locked: Server) -> None:
    headers = {"Authorization": "Bearer one"}
    children = locked.children()
    told = []
    with (
        locked.client(headers=headers) as plain,
        plain.stream("POST", PATH, json=LONGEST | {"stream": True}) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line.removeprefix("data: ")))
                if len(told) == 10:
                    locked.engine().kill()
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    last = EVENT.validate_python(told[-1], strict=True)
    TypeAdapter(responses_answer.ResponseStreamEvent).validate_python(told[-1], strict=True)
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error.code == "server_error" and "engine" in last.response.error.message
    locked.wait_for_end(children, status=None)
    assert "Traceback" not in locked.stderr


def entry(name: str, previous: str | None = None, size: int = 0, owner: bytes = b"") -> StoredResponse:
    return StoredResponse(name, owner, previous, b"i" * size, b"", b"")


def names(store: ResponseStore, *wanted: str) -> list[str]:
    """Those of the wanted that are there; asking uses them."""
    found = []
    for name in wanted:
        try:
            found.append(store.get(b"", name).id)
        except KeyError:
            continue
    return found


def test_the_store_is_bounded_by_number() -> None:
    store = ResponseStore(max_responses=3)
    for name in "abc":
        store.add(entry(name))
    store.get(b"", "a")
    store.add(entry("d"))
    assert names(store, *"abcd") == ["a", "c", "d"]
    store.delete(b"", "a")
    store.add(entry("e"))
    assert names(store, *"abcde") == ["c", "d", "e"]


def test_the_store_is_bounded_by_bytes() -> None:
    store = ResponseStore(max_bytes=16 * entry("x", size=1000).num_bytes)
    kept = [f"a{i}" for i in range(16)]
    for name in kept:
        store.add(entry(name, size=1000))
    assert names(store, *kept) == kept
    store.add(entry("e", size=2500))
    assert names(store, *kept, "e") == [*kept[2:], "e"]
    store.add(entry("f", size=100_000))  # would take more than its share
    assert names(store, *kept[2:], "e", "f") == [*kept[2:], "e"]
    for i in range(16):  # what made room is not counted any more
        store.add(entry(f"b{i}", size=1000))
    assert names(store, *kept, "e", *(f"b{i}" for i in range(16))) == [f"b{i}" for i in range(16)]


def test_a_conversation_loses_its_end_first() -> None:
    store = ResponseStore(max_responses=4)
    for name, previous in (("a", None), ("b", "a"), ("c", "b"), ("x", None)):
        store.add(entry(name, previous))
    assert [one.id for one in store.conversation(b"", "c")] == ["a", "b", "c"]
    store.add(entry("y"))
    store.add(entry("z"))
    assert [one.id for one in store.conversation(b"", "b")] == ["a", "b"]
    with pytest.raises(KeyError):
        store.conversation(b"", "c")
    store.delete(b"", "a")
    assert store.get(b"", "b").previous == "a"
    with pytest.raises(KeyError):
        store.conversation(b"", "b")


def test_nobody_drives_out_another_s_responses() -> None:
    for limits in ({"max_responses": 8}, {"max_bytes": 8 * entry("x", size=1000).num_bytes}):
        store = ResponseStore(**limits)
        for name in "ab":
            store.add(entry(name, size=1000, owner=b"modest"))
        for number in range(50):
            store.add(entry(f"{number}", size=1000, owner=b"busy"))
        assert [store.get(b"modest", name).id for name in "ab"] == ["a", "b"]
        assert [store.get(b"busy", f"{number}").id for number in range(44, 50)]
        with pytest.raises(KeyError):
            store.get(b"busy", "43")


def test_the_store_tells_owners_apart() -> None:
    store = ResponseStore()
    store.add(entry("a", owner=b"one"))
    for ask in (store.get, store.conversation, store.delete):
        for owner in (b"two", b""):
            with pytest.raises(KeyError):
                ask(owner, "a")
    assert store.get(b"one", "a").id == "a"


def test_what_is_quoted_in_errors_is_cut(server: Server) -> None:
    for path, body in ((PATH, {"input": "Hi"}), (CHAT, {"messages": [user("Hi")]})):
        response = server.post(path, {**body, "service_tier": "max " * 100_000})
        assert response.status_code == 400
        assert len(response.json()["error"]["message"]) < 1100


@pytest.mark.parametrize("field", ["input", "instructions"])
def test_a_text_that_no_context_holds_is_refused_at_once(server: Server, field: str) -> None:
    response = server.post(PATH, {"input": "Hi", field: "a" * 3_000_000})
    assert response.status_code == 400
    assert "the context cannot hold more than" in response.json()["error"]["message"]
