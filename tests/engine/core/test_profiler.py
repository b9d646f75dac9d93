"""The trace of some steps."""

import gzip
import json
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.errors import ModelLoadError
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec


def test_a_trace_holds_the_steps_that_were_asked_for(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    llm = LLM(str(checkpoint(CheckpointSpec(kind="llama"))), device="cpu", profile_dir=str(folder), profile_steps=5)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    llm.generate("Hello", params, use_tqdm=False)
    assert not list(folder.iterdir())
    llm.generate("Hello", params, use_tqdm=False)
    (file,) = folder.iterdir()
    with gzip.open(file, "rt") as opened:
        events = json.load(opened)["traceEvents"]
    embeddings = [event for event in events if event.get("name") == "aten::embedding"]
    assert len(embeddings) == 5


def test_a_trace_that_is_not_full_is_written_at_the_end(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint(CheckpointSpec(kind="llama"))
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with LLM(str(folder), device="cpu", profile_dir=str(tmp_path), profile_steps=1000) as llm:
        llm.generate("Hello", params, use_tqdm=False)
        assert not list(tmp_path.iterdir())
    (file,) = tmp_path.iterdir()
    with gzip.open(file, "rt") as opened:
        names = [event.get("name") for event in json.load(opened)["traceEvents"]]
    assert 5 < names.count("aten::embedding") < 20


def test_no_trace_of_too_few_steps(
    checkpoint: MakeCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(str(checkpoint(CheckpointSpec(kind="llama"))), device="cpu", profile_dir=str(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())
    assert "no trace was made: it begins with step 20, and there were 0" in caplog.text


def test_number_of_steps_is_checked(checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ValueError, match="--profile-steps is 0"):
        LLM(str(checkpoint(CheckpointSpec(kind="llama"))), device="cpu", profile_steps=0)


def test_a_folder_that_cannot_be_made_is_told_at_the_start(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelLoadError, match="--profile-dir .*file/x cannot be made"):
        LLM(str(checkpoint(CheckpointSpec(kind="llama"))), device="cpu", profile_dir=str(tmp_path / "file" / "x"))


def test_a_trace_that_cannot_be_written_fails_no_request(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    llm = LLM(str(checkpoint(CheckpointSpec(kind="llama"))), device="cpu", profile_dir=str(folder), profile_steps=5)
    folder.rmdir()
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    (output,) = llm.generate("Hello", params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"
