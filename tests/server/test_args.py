"""The command line: what is refused, with which status and in how many words."""

import re
from pathlib import Path

import pytest

from engine.args import EngineArgs
from engine.config import EngineConfig, create_config
from engine.errors import ModelLoadError
from server.args import ServerArgs, parse_args
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec, build_checkpoint
from tests.server.launch import run_to_end

GROUPS = ("model", "vision", "media", "scheduler and cache", "parallel", "server")
_FLAGS = """
--model --revision --tokenizer --served-model-name --dtype --device --load-format --max-model-len --seed
--image-input-type --image-token-id --image-input-shape --image-feature-size --image-processor
--image-processor-revision --disable-image-processor --limit-mm-per-prompt
--allowed-local-media-path --allowed-media-domains --allow-private-media-hosts --max-image-bytes --max-image-pixels
--max-redirects
--max-num-seqs --max-num-batched-tokens --block-size --gpu-memory-utilization --num-gpu-blocks-override
--kv-cache-memory-bytes --kv-cache-dtype --enable-prefix-caching --no-enable-prefix-caching --enforce-eager
--max-num-queued-reqs --profile-dir --profile-steps
--tensor-parallel-size --distributed-executor-backend
--host --port --uds --api-key --allowed-origins --ssl-keyfile --ssl-certfile --root-path --chat-template
--trust-request-chat-template --tool-call-parser
--response-role --max-request-bytes --shutdown-timeout --disable-playground --disable-log-requests --log-level
--log-format --otlp-traces-endpoint
"""


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_IMAGE_FETCH_TIMEOUT", raising=False)


def configure(folder: Path, *flags: str) -> EngineConfig:
    engine, _ = parse_args(["--model", str(folder), *flags])
    return create_config(engine)


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that the parser refuses flags with."""
    with pytest.raises(SystemExit) as ended:
        parse_args(["--model", "m", *flags])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        parse_args(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{group}:\n") for group in GROUPS]
    assert places == sorted(places)
    entries = re.split(r"\n  (?=--)", text[places[0] :])[1:]
    shown = {
        word for entry in entries for word in re.findall(r"^(--[\w-]+)|, (--[\w-]+)", entry) for word in word if word
    }
    assert shown == set(_FLAGS.split())
    for entry in entries:
        assert re.search("default: |; required", " ".join(entry.split())), entry


def test_defaults() -> None:
    engine, server = parse_args(["--model", "m"])
    assert engine == EngineArgs(model="m")
    assert server == ServerArgs()
    assert (server.host, server.port, server.api_key) == ("127.0.0.1", 8000, [])


def test_dashes_and_underscores() -> None:
    dashes = ["--max-model-len", "64", "--served-model-name", "a_b", "c-d", "--allow-private-media-hosts"]
    underscores = ["--max_model_len=64", "--served_model_name", "a_b", "c-d", "--allow_private_media_hosts"]
    assert parse_args(["--model", "m", *dashes]) == parse_args(["--model", "m", *underscores])
    engine, _ = parse_args(["--model", "m", "--no_enable_prefix_caching", *underscores])
    assert engine.served_model_name == ["a_b", "c-d"]
    assert engine.enable_prefix_caching is False


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--modle", "x"], "did you mean --model?"),
        (["--max_model=5"], "did you mean --max-model-len?"),
        (["org/name"], "the model is named by --model"),
        (["--trust-remote-code"], "--help lists the flags, docs/migration.md what became of vLLM's"),
    ],
    ids=str,
)
def test_what_is_no_flag(capsys: pytest.CaptureFixture[str], flags: list[str], hint: str) -> None:
    assert refused(capsys, *flags).endswith(f": {hint}\n")


def test_names_as_json() -> None:
    for given, names in {
        '["*"]': ["*"],
        '["https://a", "https://b"]': ["https://a", "https://b"],
        "[x": ["[x"],
    }.items():
        assert parse_args(["--model", "m", "--allowed-origins", given])[1].allowed_origins == names


def test_api_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    assert parse_args(["--model", "m"])[1].api_key == ["from-environment"]
    assert parse_args(["--model", "m", "--api-key", "a", "b"])[1].api_key == ["a", "b", "from-environment"]
    assert parse_args(["--api-key", "a", "--api-key", "b"])[1].api_key == ["a", "b", "from-environment"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--max-model"], ["--max-model"]),
        (["stray"], ["stray"]),
        (["--port", "x"], ["--port", "x"]),
        (["--port", "70000"], ["--port", "70000", "65535"]),
        (["--port", "-1"], ["--port"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--log-level", "loud"], ["--log-level", "loud"]),
        (["--max-image-bytes", "0"], ["--max-image-bytes", "0", "1"]),
        (["--max-image-pixels", "-5"], ["--max-image-pixels"]),
        (["--max-request-bytes", "0"], ["--max-request-bytes", "0"]),
        (["--max-redirects", "21"], ["--max-redirects", "21", "20"]),
        (["--shutdown-timeout", "-1"], ["--shutdown-timeout", "-1"]),
        (["--shutdown-timeout", "inf"], ["--shutdown-timeout", "inf"]),
        (["--shutdown-timeout", "nan"], ["--shutdown-timeout", "nan"]),
        (["--ssl-keyfile", "k.pem"], ["--ssl-keyfile", "--ssl-certfile"]),
        (["--ssl-keyfile", "/no/k", "--ssl-certfile", "/no/c"], ["--ssl-keyfile", "/no/k"]),
        (["--allowed-local-media-path", "/no/such/folder"], ["--allowed-local-media-path", "/no/such/folder"]),
        (["--api-key", ""], ["--api-key"]),
        (["--root-path", "x"], ["--root-path", "x", "/"]),
        (["--image-input-type", "image_features"], ["--image-input-type", "image_features", "offline"]),
        (["--max-model-len", "1.5"], ["--max-model-len", "1.5"]),
        (["--distributed-executor-backend", "ray"], ["--distributed-executor-backend", "ray", "mp"]),
        (["--log-format", "xml"], ["--log-format", "xml", "json"]),
        *((["--otlp-traces-endpoint", url], ["--otlp-traces-endpoint", url, "http://localhost:4318/v1/traces"])
          for url in ("", "localhost:4317", "grpc://localhost:4317", "http://", "http://host:x", "http://[::1")),
    ],
    ids=str,
)  # fmt: skip
def test_refused_by_the_parser(capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]) -> None:
    line = refused(capsys, *flags)
    for word in words:
        assert word in line


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan", "soon", ""])
def test_fetch_timeout(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", seconds)
    line = refused(capsys)
    assert "VLLM_IMAGE_FETCH_TIMEOUT" in line and repr(seconds) in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-model-len", "4096"], ["--max-model-len", "4096", "2048"]),
        (["--max-model-len", "0"], ["--max-model-len", "0"]),
        (["--max-num-seqs", "0"], ["--max-num-seqs", "0"]),
        (["--max-num-batched-tokens", "-1"], ["--max-num-batched-tokens"]),
        (["--max-num-queued-reqs", "-1"], ["--max-num-queued-reqs"]),
        (["--block-size", "10"], ["--block-size", "10", "16"]),
        (["--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization", "1.5"]),
        (["--gpu-memory-utilization", "nan"], ["--gpu-memory-utilization", "nan"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--num-gpu-blocks-override", "9", "--kv-cache-memory-bytes", "9"],
         ["--num-gpu-blocks-override", "--kv-cache-memory-bytes"]),
        (["--tensor-parallel-size", "2"], ["--tensor-parallel-size", "2"]),
        (["--disable-image-processor", "--image-processor", "x"], ["--disable-image-processor", "--image-processor"]),
        (["--image-processor-revision", "x"], ["--image-processor-revision", "--image-processor"]),
        (["--image-token-id", "5"], ["--image-token-id", "5", "700"]),
        (["--image-feature-size", "576"], ["--image-feature-size", "576", "16"]),
        (["--image-input-shape", "1,3,336,336"], ["--image-input-shape", "1,3,336,336", "1,3,56,56"]),
        (["--image-input-shape", "wide"], ["--image-input-shape", "wide", "1,3,336,336"]),
        (["--limit-mm-per-prompt", "4"], ["--limit-mm-per-prompt", "4", "image=4"]),
        (["--limit-mm-per-prompt", "video=4"], ["--limit-mm-per-prompt", "video=4"]),
        (["--limit-mm-per-prompt", "image=-1"], ["--limit-mm-per-prompt", "image=-1"]),
    ],
    ids=str,
)  # fmt: skip
def test_refused_by_the_engine(checkpoint: MakeCheckpoint, flags: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        configure(checkpoint(), *flags)
    for word in words:
        assert word in str(error.value)


def test_image_flags_that_match(checkpoint: MakeCheckpoint) -> None:
    flags = ["--image-input-type", "pixel_values", "--image-token-id", "700", "--image-input-shape", "1,3,56,56",
             "--image-feature-size", "16", "--limit-mm-per-prompt", "image=4"]  # fmt: skip
    vision = configure(checkpoint(), *flags).vision
    plain = configure(checkpoint()).vision
    assert vision is not None and plain is not None
    assert (vision.max_images, plain.max_images) == (4, 2048 // 16)
    assert (vision.image_token_id, vision.input_shape) == (plain.image_token_id, plain.input_shape)


@pytest.mark.parametrize(
    "flags",
    [["--image-input-type", "pixel_values"], ["--image-token-id", "5"], ["--limit-mm-per-prompt", "image=1"]],
    ids=str,
)
def test_image_flags_with_a_text_only_model(checkpoint: MakeCheckpoint, flags: list[str]) -> None:
    with pytest.raises(ValueError, match="text-only") as error:
        configure(checkpoint(CheckpointSpec(kind="llama")), *flags)
    assert flags[0] in str(error.value)


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    for model, words in (("/no/such/model", "does not exist"), (str(tmp_path), "config.json"), ("a/b/c", "not exist")):
        with pytest.raises(ModelLoadError, match=words):
            configure(Path(model))


@pytest.mark.parametrize(
    ("flags", "status", "word"),
    [
        (["--no-such-flag"], 2, "--no-such-flag"),
        (["--image-feature-size", "576"], 2, "576"),
        (["--model", "/no/such/model"], 1, "/no/such/model"),
        (["--chat-template", "/no/such/file.jinja"], 2, "--chat-template"),
    ],
    ids=str,
)
def test_exit_status(checkpoint: MakeCheckpoint, flags: list[str], status: int, word: str) -> None:
    """The whole program: one line, no traceback, nothing on standard output."""
    ended = run_to_end("--model", str(checkpoint()), "--log-level", "error", "--port", "0", *flags)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and word in ended.stderr


def test_weights_that_cannot_be_loaded(tmp_path: Path) -> None:
    """Found in the engine's process; told by the server's in one line."""
    folder = build_checkpoint(tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    ended = run_to_end("--model", str(folder), "--log-level", "critical", "--port", "0")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
