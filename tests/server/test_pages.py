"""The pages for people: what is served of them, with which headers, and what their files must not hold."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from engine.args import DEMO_MODEL
from server.app import create_app
from server.args import ServerArgs
from server.pages import _QUESTIONS
from tests.server.errors import check_error

FILES = sorted((Path(__file__).parents[2] / "server" / "static").iterdir())
SAMPLES = Path(__file__).parents[2] / "demo" / "samples"
PAGES = ("/", "/dashboard")
SVG = "http://www.w3.org/2000/svg"


def client(model: Path = DEMO_MODEL, **flags: Any) -> httpx.AsyncClient:
    """Of a server that has pages and no engine."""
    state: Any = SimpleNamespace(args=ServerArgs(**flags), config=SimpleNamespace(model_path=model), traces=None)
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(state)), base_url="http://vlm")


async def test_pages_and_all_that_they_name() -> None:
    async with client(api_key=["secret"]) as http:
        for page in PAGES:
            answer = await http.get(page)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
            named = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
            assert {"playground/style.css", "playground/theme.js"} < set(named)
            for name in named:
                assert not name.startswith("/")
                assert (await http.get(f"/{name}")).status_code == 200, name
        for file in FILES:
            for imported in re.findall(r'from "\./([\w.]+)"', file.read_text()):
                assert (await http.get(f"/playground/{imported}")).status_code == 200, imported


@pytest.mark.parametrize("path", [*PAGES, "/playground/playground.js", "/playground/samples/shapes.png"])
async def test_headers(path: str) -> None:
    async with client() as http:
        answer = await http.get(path)
        policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert policy.pop("img-src") == "'self' data: blob:"
        assert {policy.pop(name) for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
        assert policy.keys() == {"default-src", "base-uri", "form-action", "frame-ancestors"}
        assert set(policy.values()) == {"'none'"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"

        etag = answer.headers["etag"]
        for known in (etag, f'"other", W/{etag}'):
            again = await http.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert (await http.get(path, headers={"If-None-Match": '"other"'})).content == answer.content
        head = await http.head(path)
        assert head.status_code == 200 and head.content == b""


async def test_samples_come_with_the_demo_model_only(tmp_path: Path) -> None:
    assert set(_QUESTIONS) == {file.name for file in SAMPLES.iterdir()}
    async with client() as http:
        listed = (await http.get("/playground/samples.json")).json()
        assert {entry["file"]: entry["question"] for entry in listed} == _QUESTIONS
        for name in _QUESTIONS:
            assert (await http.get(f"/playground/samples/{name}")).content == (SAMPLES / name).read_bytes()
    async with client(tmp_path) as http:
        assert (await http.get("/playground/samples.json")).json() == []
        assert (await http.get("/playground/samples/shapes.png")).status_code == 404


async def test_below_a_root_path() -> None:
    async with client(root_path="/vlm") as http:
        for path in (*PAGES, "/playground/samples.json"):
            assert (await http.get(f"/vlm{path}")).content == (await http.get(path)).content


async def test_they_can_be_left_out() -> None:
    async with client(disable_playground=True) as http:
        for path in (*PAGES, "/playground/playground.js", "/playground/samples.json", "/playground/samples/shapes.png"):
            check_error(await http.get(path), None, path, status=404)


async def test_other_methods_and_files() -> None:
    async with client() as http:
        check_error(await http.post("/"), None, status=405)
        for path in ("/playground", "/playground/", "/playground/../args.py", "/playground/%2e%2e/args.py"):
            check_error(await http.get(path), None, status=404)
        described = (await http.get("/openapi.json")).json()["paths"]
        assert not [path for path in described if path in PAGES or path.startswith("/playground")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_stand_alone_and_parse_nothing(file: Path) -> None:
    text = file.read_text().replace(SVG, "")
    assert not re.search(r"\b(https?|wss?|ftp):/*\w", text) and "//cdn" not in text
    for risky in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "Function(",
                  "eval(", "createContextualFragment", "srcdoc", "javascript:"):  # fmt: skip
        assert risky not in text
    if file.suffix == ".html":  # what the policy would forbid
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! [^>]*src=)", text)
    if file.name != "theme.js":
        assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie", text)
