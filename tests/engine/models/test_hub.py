import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from engine.errors import ModelLoadError
from engine.models.hub import resolve_model, resolve_processor_config, resolve_tokenizer

ROOT = Path(__file__).parents[3]
REPO = "org/llava"
PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}}
NEEDED = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "preprocessor_config.json": json.dumps(PROCESSOR).encode(),
    "tokenizer.json": b"{}",
    "tokenizer.model": b"model",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
}
UNNEEDED = {
    "README.md": b"text",
    "pytorch_model.bin": b"bin",
    "consolidated.00.pth": b"pth",
    "consolidated.safetensors": b"again",
    "model.fp16-00001-of-00002.safetensors": b"again",
    "original/params.json": b"{}",
    "original/model.safetensors": b"again",
    "onnx/config.json": b"{}",
    "picture.png": b"png",
}


@dataclass
class Repo:
    files: dict[str, bytes] = field(default_factory=lambda: NEEDED | UNNEEDED)
    token: str | None = None
    status: int = 401
    code: str | None = None
    message: str | None = None
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)


class Hub(ThreadingHTTPServer):
    """What of the Hub's API a download needs, over repositories in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos: dict[str, Repo] = {}
        self.seen: list[tuple[str, str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> set[str]:
        """The files whose content was asked for."""
        return {path.partition("/resolve/")[2].partition("/")[2] for _, path, _ in self.seen if "/resolve/" in path}


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep standard error for the tests."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.seen.append((self.command, path, self.headers.get("Authorization")))
        parts = path.removeprefix("api/models/").split("/", 3)
        name, rest = "/".join(parts[:2]), parts[2:]
        repo = self.server.repos.get(name)
        is_file = "resolve" in rest
        if repo is None:
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
        elif repo.code or repo.message or (repo.status >= 403 and not repo.token):
            self.refuse(repo.status, repo.code, repo.message)
        elif repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            if not repo.gated:
                self.refuse(401, "RepoNotFound", "Invalid username or password.")
            elif is_file:
                self.refuse(403, "GatedRepo", "Access is restricted.")
            else:
                self.describe(name, repo, rest)
        elif is_file:
            self.send_file(name, repo, rest[1].partition("/")[2])
        else:
            self.describe(name, repo, rest)

    def describe(self, name: str, repo: Repo, rest: list[str]) -> None:
        if rest and rest[0] == "tree":
            self.send_json([{"type": "file", "oid": sha(f), "size": len(c), "path": f} for f, c in repo.files.items()])
        elif rest and rest[1] not in repo.revisions:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        else:
            files = [{"rfilename": file} for file in repo.files]
            self.send_json({"_id": "1", "id": name, "modelId": name, "sha": sha(name), "siblings": files})

    def send_file(self, name: str, repo: Repo, file: str) -> None:
        if file not in repo.files:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        etag = {"ETag": f'"{sha(file)}"', "X-Repo-Commit": sha(name)}
        self.send(200, repo.files[file], {"Content-Type": "application/octet-stream"} | etag)

    def send_json(self, content: Any) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str | None, message: str | None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.send(status, b"", {name: value for name, value in headers.items() if value})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def sha(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


CLIENT = """
import json, os, sys
from engine.errors import ModelLoadError
from engine.models import hub
print(flush=True)
for line in sys.stdin:
    name, token, args, options = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    try:
        result = {"value": getattr(hub, name)(*args, **options)}
    except ModelLoadError as error:
        result = {"error": str(error)}
    print(json.dumps(result, default=str), flush=True)
"""


class Client:
    """A process of its own: the Hub's client reads its environment once, when it is imported."""

    def __init__(self, home: Path, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "*",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=kept | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def ask(self, function: str, *args: str, token: str | None = None, **options: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([function, token, args, options]) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def value(self, function: str, *args: str, **options: Any) -> Any:
        answer = self.ask(function, *args, **options)
        assert "value" in answer, answer
        return answer["value"]

    def error(self, function: str, *args: str, **options: Any) -> str:
        answer = self.ask(function, *args, **options)
        assert "error" in answer, answer
        assert "\n" not in answer["error"]
        return str(answer["error"])

    def close(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.repos.clear()
    server.seen.clear()
    return server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture(scope="module")
def client(server: Hub, home: Path) -> Iterator[Client]:
    client = Client(home, HF_ENDPOINT=server.endpoint)
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(server: Hub, home: Path) -> Iterator[Client]:
    client = Client(home, HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="1")
    yield client
    client.close()


@pytest.fixture(scope="module")
def unreachable(home: Path) -> Iterator[Client]:
    client = Client(home, HF_ENDPOINT="http://127.0.0.1:9")
    yield client
    client.close()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_downloads_what_is_needed_and_no_more(hub: Hub, client: Client, home: Path) -> None:
    hub.repos["org/whole"] = Repo()
    folder = Path(client.value("resolve_model", "org/whole"))
    assert folder.is_relative_to(home)
    assert hub.fetched() == set(NEEDED)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == NEEDED


def test_second_start_downloads_nothing(hub: Hub, client: Client) -> None:
    hub.repos["org/twice"] = Repo()
    first = client.value("resolve_model", "org/twice")
    hub.seen.clear()
    assert client.value("resolve_model", "org/twice") == first
    assert hub.fetched() == set()


def test_without_weights(hub: Hub, client: Client) -> None:
    hub.repos["org/dummy"] = Repo()
    folder = Path(client.value("resolve_model", "org/dummy", weights=False))
    assert names(folder) == {name for name in NEEDED if not name.endswith(".safetensors")}
    assert names(Path(client.value("resolve_model", "org/dummy"))) == set(NEEDED)


def test_without_weights_none_need_be_there(hub: Hub, client: Client) -> None:
    hub.repos["org/config"] = Repo({"config.json": b"{}"})
    assert client.value("resolve_model", "org/config", weights=False)


def test_sends_the_token(hub: Hub, client: Client) -> None:
    hub.repos["org/private"] = Repo(token="hf_secret")
    assert client.value("resolve_model", "org/private", token="hf_secret")
    assert {token for _, _, token in hub.seen} == {"Bearer hf_secret"}


def test_named_revision(hub: Hub, client: Client) -> None:
    hub.repos["org/branches"] = Repo(revisions=("main", "v2"))
    assert client.value("resolve_model", "org/branches", "v2")
    assert any(path.endswith("/revision/v2") for _, path, _ in hub.seen)


def test_tokenizer_alone(hub: Hub, client: Client) -> None:
    hub.repos["org/tokenizer"] = Repo()
    folder = Path(client.value("resolve_tokenizer", "org/tokenizer"))
    expected = {"chat_template.jinja", "config.json", "merges.txt"}
    expected |= {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    assert names(folder) == hub.fetched() == expected


def test_processor_config_alone(hub: Hub, client: Client) -> None:
    hub.repos["org/processor"] = Repo()
    assert client.value("resolve_processor_config", "org/processor") == PROCESSOR
    assert hub.fetched() == {"preprocessor_config.json"}


def test_offline_from_the_cache(hub: Hub, client: Client, offline: Client) -> None:
    hub.repos["org/cached"] = Repo()
    folder = client.value("resolve_model", "org/cached")
    hub.seen.clear()
    assert offline.value("resolve_model", "org/cached") == folder
    assert offline.value("resolve_tokenizer", "org/cached") == folder
    assert offline.value("resolve_processor_config", "org/cached") == PROCESSOR
    assert hub.seen == []


def test_unreachable_from_the_cache(hub: Hub, client: Client, unreachable: Client) -> None:
    hub.repos["org/kept"] = Repo()
    folder = client.value("resolve_model", "org/kept")
    assert unreachable.value("resolve_model", "org/kept") == folder


def test_offline_and_not_cached(offline: Client, home: Path) -> None:
    error = offline.error("resolve_model", REPO)
    assert error == (
        f"model {REPO} is not wholly in the cache, {home}/hub, and HF_HUB_OFFLINE is set: "
        "unset it once to download, or name a local folder (there is none of this name)"
    )


def test_offline_and_cached_in_part(hub: Hub, client: Client, offline: Client) -> None:
    hub.repos["org/part"] = Repo()
    client.value("resolve_tokenizer", "org/part")
    assert "is not wholly in the cache" in offline.error("resolve_model", "org/part")


def test_unreachable_and_not_cached(unreachable: Client) -> None:
    assert unreachable.error("resolve_model", REPO) == (
        f"model {REPO} is not in the cache, and the Hub, http://127.0.0.1:9, cannot be reached: "
        "check network and proxy, or name a local folder (there is none of this name)"
    )


@pytest.mark.parametrize(("token", "ending"), [("hf_wrong", ""), (None, " (no token is set)")])
def test_unknown_or_private(hub: Hub, client: Client, token: str | None, ending: str) -> None:
    hub.repos["org/closed"] = Repo(token="hf_secret")
    expected = "is neither a local folder nor on the Hub, or is private: check the name; for a private one set "
    expected += f"HF_TOKEN to a token that may read it{ending}"
    assert client.error("resolve_model", "org/closed", token=token) == f"model org/closed {expected}"
    assert client.error("resolve_model", "org/nothing", token=token) == f"model org/nothing {expected}"


def test_gated(hub: Hub, client: Client) -> None:
    hub.repos["org/gated"] = Repo(token="hf_secret", gated=True)
    assert client.error("resolve_model", "org/gated", token="hf_other") == (
        f"model org/gated is gated: accept its licence on {hub.endpoint}/org/gated, "
        "then set HF_TOKEN to a token of the account that did"
    )


def test_refused_token(hub: Hub, client: Client) -> None:
    hub.repos["org/any"] = Repo(message="Invalid credentials in Authorization header")
    error = client.error("resolve_model", "org/any", token="hf_stale")
    assert error == "model org/any cannot be downloaded: the Hub refuses the token: renew HF_TOKEN or unset it"


def test_missing_revision(hub: Hub, client: Client) -> None:
    hub.repos[REPO] = Repo()
    assert client.error("resolve_model", REPO, "v9") == (
        f"model {REPO} has no revision v9: name a branch, tag or commit with --revision"
    )


@pytest.mark.parametrize(
    ("status", "problem"),
    [(403, "the Hub forbids it"), (404, "status 404"), (451, "status 451")],
)
def test_other_answers(hub: Hub, client: Client, status: int, problem: str) -> None:
    hub.repos["org/odd"] = Repo(status=status)
    assert problem in client.error("resolve_model", "org/odd")


def test_no_safetensors(hub: Hub, client: Client) -> None:
    hub.repos["org/bin"] = Repo({"config.json": b"{}", "pytorch_model.bin": b"bin"})
    error = client.error("resolve_model", "org/bin")
    assert error.startswith("model org/bin has no *.safetensors weights on the Hub, and no other format is loaded")
    assert hub.fetched() == {"config.json"}


def test_no_config(hub: Hub, client: Client) -> None:
    hub.repos["org/gguf"] = Repo({"model.safetensors": b"x"})
    assert client.error("resolve_model", "org/gguf").startswith("model org/gguf has no config.json on the Hub")


def test_no_tokenizer_and_no_processor(hub: Hub, client: Client) -> None:
    hub.repos["org/bare"] = Repo({"config.json": b"{}"})
    assert client.error("resolve_tokenizer", "org/bare").startswith("tokenizer org/bare holds none of")
    assert "has neither preprocessor_config.json nor" in client.error("resolve_processor_config", "org/bare")


def test_local_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve_tokenizer("~") == tmp_path


def test_local_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"is a folder without config\.json"):
        resolve_model(str(tmp_path))


def test_local_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ModelLoadError, match="is a file: name the folder"):
        resolve_model(str(file))


@pytest.mark.parametrize("name", ["/no/such", "./none", "../none", "~/none", "a/b/c", "none/", "C:\\none"])
def test_missing_path(name: str) -> None:
    with pytest.raises(ModelLoadError, match="does not exist: give a local folder or a Hub id"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["two words", "a--b/c", "org/-name"])
def test_no_id_at_all(name: str) -> None:
    with pytest.raises(ModelLoadError, match="is neither a local folder nor a Hub id"):
        resolve_model(name)


def test_empty_name() -> None:
    with pytest.raises(ModelLoadError, match="empty name"):
        resolve_model("")


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "does not fit on the disk of the cache"),
        (
            RuntimeError("Data processing error: No space left on device"),
            "does not fit on the disk of the cache",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written: set HF_HOME"),
        (RuntimeError("connection\nlost"), r"\(RuntimeError: connection lost\): check network"),
    ],
)
def test_interrupted(monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelLoadError, match=problem):
        resolve_model(REPO)


def test_processor_config_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert resolve_processor_config(str(tmp_path)) == PROCESSOR


def test_nested_processor_config_counts(tmp_path: Path) -> None:
    newer = PROCESSOR | {"do_pad": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": newer}))
    assert resolve_processor_config(str(tmp_path)) == newer


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_unreadable_processor_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ModelLoadError, match="cannot be read") as caught:
        resolve_processor_config(str(tmp_path))
    assert "\n" not in str(caught.value)
