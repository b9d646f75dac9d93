"""Real servers in processes of their own, for tests that speak to them over sockets."""

import base64
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
_START_SECONDS = 120.0
_STOP_SECONDS = 20.0
_SERVING = re.compile(r"^Serving (?P<names>.+) at (?P<url>\S+)$", re.MULTILINE)

Launch = Callable[..., "Server"]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without what would change the server, and with one thread for each of its parts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTEST_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(extra or {})}


def run_to_end(*flags: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m server` with flags that make it end by itself."""
    command = [sys.executable, "-m", "server", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=environment(env), capture_output=True, text=True, timeout=_START_SECONDS, check=False
    )


@dataclass
class Server:
    """A server that was started; `wait_until_serving` fills in its address."""

    process: subprocess.Popen[bytes]
    folder: Path
    """Of its output files."""
    url: str = ""
    names: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, folder: Path, *flags: str, env: Mapping[str, str] | None = None) -> "Server":
        """Start `python -m server` and return at once."""
        command = [sys.executable, "-m", "server", "--port", "0", *flags]
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(env), stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        return cls(process, folder)

    def wait_until_serving(self) -> "Server":
        """Wait for the line that says where it listens."""
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            line = _SERVING.search(self.stdout)
            if line is not None:
                self.url, self.names = line["url"], line["names"].split(", ")
                return self
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}: {self.stderr}"
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.stderr}")

    @property
    def stdout(self) -> str:
        """All that it wrote so far."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """All that it wrote so far."""
        return (self.folder / "stderr").read_text()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def children(self) -> list[psutil.Process]:
        """Its processes, the engine among them."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine(self) -> psutil.Process:
        """The engine's process: of the children, the one that holds the model."""
        return max(self.children(), key=lambda process: process.memory_info().rss)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end; it must do so with status 0 and leave no child behind."""
        children = self.children()
        self.process.send_signal(number)
        self.wait_for_end(children, status=0)

    def wait_for_end(
        self, children: list[psutil.Process], *, status: int | None, seconds: float = _STOP_SECONDS
    ) -> int:
        """Wait until it ended with `status` (None: any but 0), and until its children did."""
        try:
            found = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill(children)
            raise AssertionError(f"the server did not end in {seconds:g} s: {self.stderr}") from None
        alive = _still_running(children, 5)
        self.kill(alive)
        assert not alive, f"children are left: {alive}"
        assert found == status if status is not None else found != 0, f"exit status {found}: {self.stderr}"
        return found

    def kill(self, children: list[psutil.Process] | None = None) -> None:
        """End it and its children the hard way."""
        if self.process.poll() is None:
            children = self.children() if children is None else children
            self.process.kill()
            self.process.wait()
        for child in children or []:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue

    def client(self, **options: Any) -> httpx.Client:
        """A plain HTTP client of it; close it."""
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST one JSON body."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, trust_env=False, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET one path."""
        return httpx.get(f"{self.url}{path}", timeout=60, trust_env=False, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample on the metrics page; 0 where it is not there yet."""
        for line in self.get("/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            found = re.fullmatch(r"([\w:]+)(?:\{(.*)\})?", series)
            if found is None or found[1] != name:
                continue
            given = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
            if all(given.get(label) == text for label, text in labels.items()):
                return float(value)
        return 0.0

    def wait_for_metric(self, name: str, wanted: Callable[[float], bool], seconds: float = 5.0) -> float:
        """Wait until a sample is as wanted."""
        end = time.monotonic() + seconds
        while True:
            value = self.metric(name)
            if wanted(value):
                return value
            assert time.monotonic() < end, f"{name} is still {value:g}"
            time.sleep(0.02)


def _still_running(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after at most so many seconds; what only waits to be reaped by init does not run."""
    end = time.monotonic() + seconds
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < end:
        time.sleep(0.02)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def data_url(file: Path) -> str:
    """An image file as a data URL."""
    kind = "jpeg" if file.suffix == ".jpg" else file.suffix[1:]
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def image_part(url: str) -> dict[str, Any]:
    """A content part that names an image."""
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    """A content part of text."""
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    """A user's message: of one text, or of several parts."""
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def assistant(text: str) -> dict[str, Any]:
    """An answer of earlier."""
    return {"role": "assistant", "content": text}
