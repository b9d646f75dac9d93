"""Grafana's dashboard draws what the server tells, all of it and nothing else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.image import DEPLOY
from tests.server.launch import Server, data_url, image_part, text_part, user

DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
OF_PROMETHEUS = {"instance", "job"}

Samples = dict[str, set[str]]
"""Name of each sample, and the names of its labels."""


@pytest.fixture(scope="module")
def text(server: Server, photo_files: list[Path]) -> str:
    """The metrics after a picture was asked about."""
    message = user(text_part("What is this?"), image_part(data_url(photo_files[0])))
    assert server.post("/v1/chat/completions", {"messages": [message], "max_tokens": 4}).status_code == 200
    return server.get("/metrics").text


@pytest.fixture(scope="module")
def samples(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def walk(expression: str) -> Iterator[promql_parser.Expr]:
    """An expression and all that it is made of, as Prometheus reads it; Grafana fills in the interval first."""
    parts: list[promql_parser.Expr] = []
    whole = promql_parser.parse(expression.replace("$__rate_interval", "1m"))
    promql_parser.walk(whole, parts.append)
    yield from parts


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    return [part for part in walk(expression) if isinstance(part, promql_parser.VectorSelector)]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_asked_for_is_there(expression: str, samples: Samples) -> None:
    found = selectors(expression)
    assert found
    for selector in found:
        assert selector.name in samples
        assert {matcher.name for matcher in selector.matchers.matchers} <= samples[selector.name] | OF_PROMETHEUS
    for part in walk(expression):
        if isinstance(part, promql_parser.AggregateExpr) and part.modifier is not None:
            assert all(
                {*part.modifier.labels} <= samples[one.name] | OF_PROMETHEUS for one in selectors(str(part.expr))
            )


def test_all_that_the_server_tells_is_drawn(text: str) -> None:
    drawn = {selector.name for expression in EXPRESSIONS for selector in selectors(expression)}
    for family in text_string_to_metric_families(text):
        assert drawn & {sample.name for sample in family.samples}, family.name


def test_variables(samples: Samples) -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    for variable in variables.values():
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", variable["query"]["query"])
            assert found is not None
            assert found[2] in samples[found[1]] | OF_PROMETHEUS
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"])))
    assert used == {*variables, "__rate_interval"}


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
