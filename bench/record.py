"""Files of figures, with all that tells where they come from."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.version import program_version

_KEYS = {"kind": str, "date": str, "program": str, "settings": dict, "result": dict}


@dataclass(frozen=True, slots=True)
class Record:
    """One run of a benchmark."""

    kind: str
    """The command: `serve`, `sweep` …"""
    date: str
    program: str
    """This program's version; of a server's own there is `server`."""
    settings: dict[str, Any]
    server: dict[str, Any] | None
    """The model that was asked and what /version told; None where there was no server."""
    result: Any
    """A dataclass; of a file, a dictionary."""

    @property
    def origin(self) -> str:
        """What was measured, for people."""
        if self.server is None:
            return f"the engine, version {self.program}"
        version = self.server.get("version")
        told = ", ".join(f"{name} {value}" for name, value in version.items()) if isinstance(version, dict) else ""
        return f"model {self.server.get('model')}, server: {told or 'version unknown'}"


def new(kind: str, settings: dict[str, Any], result: Any, server: dict[str, Any] | None = None) -> Record:
    """Of what has just been measured."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(kind, now, program_version(), settings, server, result)


def write(path: Path, written: Record) -> None:
    """As JSON."""
    path.write_text(json.dumps(asdict(written), indent=1, default=str) + "\n", encoding="utf-8")


def read(path: Path) -> Record:
    """What `write` wrote.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or any(not isinstance(found.get(key), kind) for key, kind in _KEYS.items()):
        raise ValueError(f"{path} holds no figures of `python -m bench`")
    server = found.get("server")
    return Record(server=server if isinstance(server, dict) else None, **{key: found[key] for key in _KEYS})
