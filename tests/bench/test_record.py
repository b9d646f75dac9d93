"""Files of figures."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bench import record
from server.version import program_version


@dataclass
class Figures:
    seconds: float
    parts: list["Figures"]


def test_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    made = record.new("serve", {"rate": 2.0, "path": tmp_path}, Figures(1.5, [Figures(2.0, [])]), {"model": "m"})
    record.write(file, made)
    found = record.read(file)
    assert (found.kind, found.program, found.server) == ("serve", program_version(), {"model": "m"})
    assert found.settings == {"rate": 2.0, "path": str(tmp_path)}
    assert found.result == {"seconds": 1.5, "parts": [{"seconds": 2.0, "parts": []}]}
    assert abs(datetime.now(UTC) - datetime.fromisoformat(found.date)) < timedelta(minutes=5)


@pytest.mark.parametrize(
    ("server", "origin"),
    [
        (None, "the engine, version "),
        ({"model": "m", "version": {"version": "7", "torch": "2"}}, "model m, server: version 7, torch 2"),
        ({"model": "m", "version": None}, "model m, server: version unknown"),
    ],
)
def test_origin(server: dict[str, object] | None, origin: str) -> None:
    found = record.new("serve", {}, Figures(1.0, []), server).origin
    assert found == (origin if server else origin + program_version())


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "holds no figures"),
        (b'{"result": {}, "settings": {}}', "holds no figures"),
        (json.dumps({"kind": "serve", "date": "", "program": "", "settings": {}, "result": []}).encode(), "holds no"),
    ],
)
def test_unreadable(written: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    if written is not None:
        file.write_bytes(written)
    with pytest.raises(ValueError, match=message) as raised:
        record.read(file)
    assert str(file) in str(raised.value)
