"""Requests made from /openapi.json, right ones and wrong ones, to a live server: answers are as described there."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.conftest import MakeCheckpoint
from tests.server.launch import Launch, assistant, user
from tests.server.test_openapi import OPERATIONS

KEY = "the-key"
LIMITS = settings(
    max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
# Ranges, and what fields need of each other, are no part of the description: what it allows may still be a 400.
NOT_PROMISED = [schemathesis.checks.positive_data_acceptance]

WITH_PARAMETERS = [(method, path) for method, path in OPERATIONS if method == "post" or "{" in path]
WELL_MADE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [user("Hi"), assistant("Hello."), user({"type": "text", "text": "é"})]},
    "/v1/completions": {"prompt": [[1, 300], [400]]},
    "/v1/responses": {"input": [user({"type": "input_text", "text": "Hi"})]},
    "/v1/messages": {"model": "vlm", "messages": [user("Hi"), assistant("Hello."), user("é")], "max_tokens": 4},
    "/v1/messages/count_tokens": {"model": "vlm", "messages": [user({"type": "text", "text": "Hi"})]},
    "/tokenize": {"messages": [user("Hi")]},
    "/detokenize": {"tokens": [1, 300]},
}


@pytest.fixture(scope="module")
def schema(launch: Launch, checkpoint: MakeCheckpoint) -> Any:
    """Of a server whose small context keeps answers short that have no limit of their own."""
    server = launch(checkpoint(), "--served-model-name", "vlm", "--api-key", KEY, "--max-model-len", "128")
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def statuses(cases: st.SearchStrategy[Any], change: Callable[[Any, st.DataObject], None] | None = None) -> Counter[int]:
    """Send the cases, each after a change, check the answers, and count them."""
    counts: Counter[int] = Counter()

    @LIMITS
    @given(case=cases, data=st.data())
    def check(case: Any, data: st.DataObject) -> None:
        if change is not None:
            change(case, data)
        headers = {"Authorization": f"Bearer {KEY}"}
        counts[case.call_and_validate(headers=headers, excluded_checks=NOT_PROMISED).status_code] += 1

    check()
    return counts


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=str)
def test_what_the_description_allows(schema: Any, method: str, path: str) -> None:
    assert statuses(schema[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE))


@pytest.mark.parametrize(("method", "path"), WITH_PARAMETERS, ids=str)
def test_what_the_description_does_not_allow(schema: Any, method: str, path: str) -> None:
    counts = statuses(schema[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    assert counts.keys() & {400, 404}


@pytest.mark.parametrize("path", WELL_MADE)
def test_one_field_beside_well_made_ones(schema: Any, path: str) -> None:
    def thin_out(case: Any, data: st.DataObject) -> None:
        others = sorted(case.body.keys() - WELL_MADE[path].keys() - {"model", "prompt"})
        kept = data.draw(st.sampled_from(others)) if others else None
        case.body = WELL_MADE[path] | ({} if kept is None else {kept: case.body[kept]})

    counts = statuses(schema[path]["POST"].as_strategy(generation_mode=GenerationMode.POSITIVE), thin_out)
    assert counts[200] > 5
