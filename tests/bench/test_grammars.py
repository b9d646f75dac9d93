"""The benchmark of grammars runs with the library that the engine uses."""

import subprocess
import sys
from pathlib import Path

from bench.grammars import SCHEMAS
from engine.args import DEMO_MODEL

ROOT = Path(__file__).parents[2]


def test_it_runs() -> None:
    tokenizer = Path(DEMO_MODEL) / "tokenizer.json"
    command = [sys.executable, "-m", "bench.grammars", str(tokenizer), "--vocab-size", "2112"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    head, name, *lines = done.stdout.splitlines()
    assert "compile" in head and name == "llguidance"
    assert [line[:18].strip() for line in lines[: len(SCHEMAS) + 1]] == [*SCHEMAS, "all"]
