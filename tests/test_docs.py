"""What the documents tell people to type does what they say."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

from engine.args import EngineArgs
from server.args import ServerArgs, parse_args
from tests.server.launch import ROOT, Server, environment

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDRESS = "http://127.0.0.1:8000"
_BLOCK = re.compile(r"^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path, kind: str) -> list[str]:
    """The code of one language in a document."""
    found = _BLOCK.finditer(document.read_text(encoding="utf-8"))
    return [block["code"] for block in found if block["kind"] == kind]


def commands(document: Path) -> list[list[str]]:
    """Each command of a document's shell blocks, as words."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True) for line in lines if re.match(r"(?:[A-Z_]+=\S* )*(?:python|make|\.venv)", line)
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server.start(tmp_path_factory.mktemp("server")).wait_until_serving()
    yield started
    started.stop()


def run(command: list[str], server: Server) -> str:
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert server.process.poll() is None
    return done.stdout


def with_python(document: Path) -> bool:
    return bool(blocks(document, "python"))


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if with_python(path)], ids=lambda path: path.stem)
def test_python(document: Path, server: Server, tmp_path: Path) -> None:
    """All of a document's, one behind the other in one program."""
    script = tmp_path / "script.py"
    script.write_text("\n".join(blocks(document, "python")).replace(ADDRESS, server.url), encoding="utf-8")
    assert run([sys.executable, "-W", "error::DeprecationWarning", str(script)], server)


def test_the_data_of_a_picture_is_right(server: Server, tmp_path: Path) -> None:
    """And as the README prints it."""
    (promised,) = blocks(ROOT / "README.md", "json")
    script = tmp_path / "script.py"
    code = [code for code in blocks(ROOT / "README.md", "python") if "client" in code]
    script.write_text("\n".join(code).replace(ADDRESS, server.url), encoding="utf-8")
    found = run([sys.executable, str(script)], server).splitlines()[-1]
    assert json.loads(found) == json.loads(promised)


def with_curl(document: Path) -> bool:
    return any("curl" in code for code in blocks(document, "bash"))


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if with_curl(path)], ids=lambda path: path.stem)
def test_curl(document: Path, server: Server, tmp_path: Path) -> None:
    for code in blocks(document, "bash"):
        if "curl" in code:
            text = code.replace(ADDRESS, server.url).replace("curl ", "curl -sS --fail-with-body ")
            text = text.replace("request.json", str(tmp_path / "request.json"))
            assert run(["bash", "-euo", "pipefail", "-c", text], server)


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if commands(path)], ids=lambda path: path.stem)
def test_flags(document: Path) -> None:
    """The server's flags exist, and the modules that are run."""
    seen = 0
    for words in commands(document):
        given: list[str] | None = None
        if "-m" in words:
            module, *given = words[words.index("-m") + 1 :]
            assert module == "pip" or any(
                (ROOT / module.replace(".", "/")).with_suffix(end).exists() for end in ("", ".py")
            )
            given = given if module == "server" else None
        elif words[:2] == ["make", "serve"]:
            given = shlex.split(next((w.removeprefix("ARGS=") for w in words if w.startswith("ARGS=")), ""))
        if given is not None and "--help" not in given:
            parse_args(given)
            seen += 1
    assert seen or document.name != "README.md"


def test_every_flag_is_told() -> None:
    """In the guide to serving."""
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    flags = ["--" + field.name.replace("_", "-") for field in (*EngineArgs.flags(), *fields(ServerArgs))]
    assert [flag for flag in flags if not re.search(f"{flag}(?![a-z-])", guide)] == []


def test_guides_name_flags_that_exist() -> None:
    """vLLM's are told apart in the guide for those who come from it."""
    flags = {"--" + field.name.replace("_", "-") for field in (*EngineArgs.flags(), *fields(ServerArgs))}
    others = {"--help", "--no-enable-prefix-caching", "--gpus"}
    for name in ("quickstart", "serving", "offline", "troubleshooting"):
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= flags | others, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(document: Path) -> None:
    """To a file of the project, and to a heading in it."""
    for path, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", document.read_text(encoding="utf-8")):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], heading


def quoted() -> list[str]:
    """The messages that people look up."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (?:503 |500 )?`(.+?)`", text, re.MULTILINE)


@pytest.mark.parametrize("message", quoted())
def test_messages_are_those_of_the_program(message: str) -> None:
    """Each piece between two places that vary stands in the source."""
    files = [file for package in ("engine", "server") for file in (ROOT / package).rglob("*.py")]
    # Strings that are written in several pieces are joined, and what is filled in is cut out.
    source = "\n".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8")) for file in files)
    source = re.sub(r"\{[^{}\n]*\}", "…", source)
    for piece in message.split("…"):
        assert piece.strip() in source


def form(schema: dict[str, object]) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Hi"}], "structured_outputs": {"json": schema}}


def part(**fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": [fields]}]}


@pytest.mark.parametrize(
    ("message", "body"),
    [
        ("Unimplemented keys: …", form({"not": {}})),
        ("Unknown format: …", form({"type": "string", "format": "color"})),
        ("Unsatisfiable schema: …", form({"type": "integer", "minimum": 2, "maximum": 1})),
        ("image_url: Input should be an object", part(type="image_url", image_url="data:image/png;base64,AAAA")),
        ("Input should be 'text' or 'image_url'", part(type="video_url", video_url={"url": "http://example.com"})),
    ],
)
def test_messages_of_libraries(message: str, body: dict[str, object], server: Server) -> None:
    """They are told as they come."""
    assert f'"{message}"' in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert message.removesuffix("…") in answer.json()["error"]["message"]
