"""What the Dockerfile says about the containers that everything in deploy/ starts."""

import json
import re
from pathlib import Path

from engine.client import _STOP_SECONDS
from server.args import ServerArgs, parse_args
from server.run import _FAREWELL_SECONDS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
_TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")

END_SECONDS = _FAREWELL_SECONDS + _STOP_SECONDS
"""That the server may take to end once `--shutdown-timeout` is over."""


def instruction(pattern: str) -> str:
    """What follows `pattern` in a line of the file."""
    found = re.search(rf"^{pattern}(.+)$", _TEXT, re.MULTILINE)
    assert found is not None, pattern
    return found[1].removesuffix("\\").strip()


def server_args(flags: list[str]) -> ServerArgs:
    """The container's flags, as the server reads them; SystemExit where it does not know one."""
    *program, host, address = json.loads(instruction("ENTRYPOINT "))
    assert program == ["python", "-m", "server"]
    return parse_args([host, address, *flags])[1]
