"""The commands, end to end, on the demo model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.args import DEMO_MODEL
from tests.server.launch import Launch, Server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(launch: Launch) -> Server:
    """One for all of this file."""
    return launch(DEMO_MODEL)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def result(file: Path) -> Any:
    return json.loads(file.read_text())["result"]


@pytest.mark.parametrize("arrival", [("--concurrency", "3"), ("--rate", "20")])
def test_serve(server: Server, tmp_path: Path, arrival: tuple[str, str]) -> None:
    file = tmp_path / "figures.json"
    load = ("--requests", "6", "--warmup", "1", "--image", "64x48", "--max-tokens", "7", "--ignore-eos")
    done = run("serve", "--base-url", server.url, *load, *arrival, "--json", file)
    assert done.returncode == 0, done.stderr
    assert "6 of 6 completed, 0 errors, 0 of wrong length" in done.stdout
    found = result(file)
    assert (found["completed"], found["errors"], found["wrong_length"]) == (6, {}, 0)
    assert found["output_tokens_per_s"] == pytest.approx(42 / found["duration_s"])
    assert 0 < found["ttft_ms"]["p50"] < found["e2e_ms"]["p50"] <= 1000 * found["duration_s"]


def test_conversations(server: Server, tmp_path: Path) -> None:
    """Several sizes of pictures, several turns; the file tells where its figures come from, but no key."""
    file = tmp_path / "figures.json"
    load = ("--requests", "4", "--warmup", "1", "--image", "64x48,32x32,none", "--max-tokens", "5", "--turns", "3")
    done = run("serve", "--base-url", server.url, *load, "--concurrency", "2", "--api-key", "sesame", "--json", file)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 completed, 0 errors" in done.stdout and "  turn 3" in done.stdout
    assert len(result(file)["turns_ttft_ms"]) == 3
    written = json.loads(file.read_text())
    assert (written["kind"], written["server"]["version"]) == ("serve", server.get("/version").json())
    assert written["settings"]["image"] == "64x48,32x32,none" and written["settings"]["turns"] == 3
    assert "sesame" not in file.read_text()


def test_sweep_and_compare(server: Server, tmp_path: Path) -> None:
    file, page = tmp_path / "figures.json", tmp_path / "figures.html"
    load = ("--base-url", server.url, "--requests", "3", "--warmup", "1", "--image", "none", "--max-tokens", "4")
    done = run("sweep", *load, "--rates", "5:10:5", "--concurrencies", "2", "--json", file, "--plot", page)
    assert done.returncode == 0, done.stderr
    assert [point["load"] for point in result(file)["points"]] == ["5/s", "10/s", "2 at once"]
    assert [row.split("  ")[0] for row in map(str.strip, done.stdout.splitlines())][1:-1] == [
        "5/s",
        "10/s",
        "2 at once",
    ]
    assert "<svg" in page.read_text()
    done = run("sweep", *load, "--rates", "5,10", "--concurrencies", "2,3", "--max-ttft-p95-ms", "0.001")
    assert done.returncode == 0 and "2 loads were left out" in done.stdout
    done = run("compare", file, file)
    assert done.returncode == 0, done.stderr
    assert "the same settings" in done.stdout and "points.2 at once.summary.ttft_ms.p95" in done.stdout


def test_serve_answers_of_a_form(server: Server, tmp_path: Path) -> None:
    """Each answer has as many tokens as its only form takes, whatever the model would say."""
    schema, file = tmp_path / "schema.json", tmp_path / "figures.json"
    load = ("--base-url", server.url, "--requests", "3", "--warmup", "1", "--image", "none", "--json-schema", schema)
    schema.write_text('{"const": 12345}')
    done = run("serve", *load, "--max-tokens", "40", "--json", file)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 completed, 0 errors" in done.stdout
    assert result(file)["output_tokens_per_s"] * result(file)["duration_s"] <= 3 * 8
    schema.write_text('{"not": {}}')
    done = run("serve", *load)
    assert done.returncode == 1 and "the warm-up failed" in done.stderr and "not" in done.stderr
    schema.write_text("[]")
    done = run("serve", *load)
    assert done.returncode == 2 and "holds no JSON object" in done.stderr


def test_latency_and_throughput(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    common = ("--image", "64x48", "--max-tokens", "5", "--device", "cpu", "--json", file)
    done = run("latency", "--batch-size", "2", "--iterations", "2", "--warmup", "1", *common)
    assert done.returncode == 0, done.stderr
    found = result(file)
    assert found["batch_size"] == 2 and found["ms_per_token"] == pytest.approx(found["batch_ms"]["mean"] / 5)
    done = run("throughput", "--requests", "3", *common)
    assert done.returncode == 0, done.stderr
    found = result(file)
    assert found["requests"] == 3 and found["output_tokens_per_s"] == pytest.approx(15 / found["duration_s"])
    assert found["total_tokens_per_s"] > found["output_tokens_per_s"]


def test_mistakes_are_explained() -> None:
    done = run("serve", "--base-url", "http://127.0.0.1:9", "--requests", "1")
    assert done.returncode == 1 and "does not name a model" in done.stderr and "Traceback" not in done.stderr
    done = run("throughput", "--requests", "0")
    assert done.returncode == 2 and "'0' is no whole number of at least 1" in done.stderr
    done = run("sweep")
    assert done.returncode == 2 and "sweep takes --rates, --concurrencies or both" in done.stderr
    done = run("compare", "nothing.json", "nothing.json")
    assert done.returncode == 1 and "error: nothing.json cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("library", "words", "message"),
    [
        ("aiohttp", ("serve",), "`serve` takes aiohttp: python -m pip install '.[bench]'"),
        ("aiohttp", ("sweep", "--rates", "1"), "`sweep` takes aiohttp: python -m pip install '.[bench]'"),
        (
            "matplotlib",
            ("sweep", "--rates", "1", "--plot", "page.html"),
            "`--plot` takes matplotlib: python -m pip install '.[bench]'",
        ),
    ],
)
def test_a_missing_library_is_named(library: str, words: tuple[str, ...], message: str) -> None:
    """Before anything is sent: nothing listens there."""
    hidden = (
        f"import sys; sys.modules[{library!r}] = None; sys.argv = ['bench', *{words!r}]; "
        "import bench.__main__ as b; b.main()"
    )
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr
