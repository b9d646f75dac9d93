"""What happens to the processes: killed, told to end, without a disk to write to, under a clock that jumps."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine.errors import ModelLoadError
from server.args import ServerArgs
from server.run import _listen
from tests.conftest import MakeCheckpoint
from tests.random_checkpoint import CheckpointSpec
from tests.server.errors import error_of
from tests.server.launch import ROOT, Launch, data_url, environment, image_part, text_part, user

CHAT = "/v1/chat/completions"
LONG = CheckpointSpec(max_position_embeddings=16384)
LONGEST = {"max_tokens": 16000, "ignore_eos": True, "temperature": 0}
HELLO: dict[str, Any] = {"messages": [user("Hello")], "max_tokens": 8, "temperature": 0}
RUNNING = "vllm:num_requests_running"

# Seconds since 1970 jump by weeks, forwards and back, at every look.
JUMPING = """
import itertools, time
_jumps, _time = itertools.cycle([0, 3e6, -3e6, 10, -10]), time.time
time.time = lambda: _time() + next(_jumps)
time.time_ns = lambda: int(time.time() * 1e9)
"""


@pytest.fixture
def own_tmp(tmp_path: Path) -> Path:
    """A server's folder for temporary files; the one that it makes for its sockets may not be left there."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> httpx.Client:
    """A client of a server on a Unix socket, once it listens."""
    end = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.returncode
        with closing(socket.socket(socket.AF_UNIX)) as probe:
            if probe.connect_ex(str(path)) == 0:
                break
        assert time.monotonic() < end
        time.sleep(0.05)
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://server", timeout=60)


def full_disk_and_broken_pipe(command: list[str]) -> subprocess.Popen[bytes]:
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") as full, open(write, "wb") as broken:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=full, stderr=broken)


def all_closed(command: list[str]) -> subprocess.Popen[bytes]:
    words = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    return subprocess.Popen(words, cwd=ROOT, env=environment())


@pytest.mark.parametrize("start", [full_disk_and_broken_pipe, all_closed])
def test_nowhere_to_write(
    checkpoint: MakeCheckpoint, tmp_path: Path, start: Callable[[list[str]], "subprocess.Popen[bytes]"]
) -> None:
    path = tmp_path / "socket"
    process = start(
        [sys.executable, "-m", "server", "--model", str(checkpoint(LONG)), "--device", "cpu", "--uds", str(path)]
    )
    try:
        with closing(wait_for(path, process)) as client:
            assert client.post(CHAT, json=HELLO).status_code == 200
            assert client.post(CHAT, json={"messages": 5}).status_code == 400
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        assert not psutil.wait_procs(children, timeout=5)[1] and not path.exists()
    finally:
        process.kill()
        process.wait()


def test_a_clock_that_jumps(
    launch: Launch, checkpoint: MakeCheckpoint, tmp_path: Path, own_tmp: Path, photo_files: list[Path]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    env = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(own_tmp)}
    jumping = launch(checkpoint(LONG), "--shutdown-timeout", "0.5", env=env)
    created = [jumping.post(CHAT, HELLO).json()["created"] for _ in range(5)]
    assert max(created) - min(created) > 1e6  # it does jump, and only this shows it
    content = image_part(data_url(photo_files[0])), text_part("What?")
    asked = {"messages": [user(*content)], "max_tokens": 20, "temperature": 0}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: jumping.post(CHAT, asked), range(8)))
        assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
        seconds = jumping.metric("vllm:e2e_request_latency_seconds_sum")
        assert 0 < seconds < 600
        running = pool.submit(jumping.post, CHAT, {**HELLO, **LONGEST})
        jumping.wait_for_metric(RUNNING, lambda value: value == 1)
        begun = time.monotonic()
        jumping.stop()
        assert 0.4 < time.monotonic() - begun < 10
        error_of(running.result(), 503)
    assert not list(own_tmp.glob("engine-*"))


def test_signals_in_every_phase_of_serving(launch: Launch, checkpoint: MakeCheckpoint, own_tmp: Path) -> None:
    """The engine's process takes none; the server's drains at the first and hurries at the second and third."""
    server = launch(checkpoint(LONG), "--shutdown-timeout", "100", env={"TMPDIR": str(own_tmp)})
    exact = server.post(CHAT, HELLO).json()["choices"]
    children = server.children()
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.post, CHAT, {**HELLO, **LONGEST}) for _ in range(2)]
        server.wait_for_metric(RUNNING, lambda value: value == 2)
        for number in (signal.SIGTERM, signal.SIGINT):
            server.engine().send_signal(number)
        assert server.post(CHAT, HELLO).json()["choices"] == exact
        server.process.send_signal(signal.SIGTERM)
        while server.get("/health").status_code == 200:
            time.sleep(0.02)
        assert not any(one.done() for one in running)
        server.process.send_signal(signal.SIGINT)
        for one in running:
            assert "shutting down" in error_of(one.result(10), 503)["message"]
        server.process.send_signal(signal.SIGTERM)
    server.wait_for_end(children, status=0)
    assert not list(own_tmp.glob("engine-*")) and "Traceback" not in server.stderr


def test_an_engine_that_dies_while_requests_drain(launch: Launch, checkpoint: MakeCheckpoint, own_tmp: Path) -> None:
    server = launch(checkpoint(LONG), "--shutdown-timeout", "100", env={"TMPDIR": str(own_tmp)})
    children = server.children()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, CHAT, {**HELLO, **LONGEST})
        server.wait_for_metric(RUNNING, lambda value: value == 1)
        engine = server.engine()
        server.process.send_signal(signal.SIGINT)
        while server.get("/health").status_code == 200:
            time.sleep(0.02)
        engine.kill()
        error_of(running.result(10), 503)
    server.wait_for_end(children, status=None)
    assert not list(own_tmp.glob("engine-*")) and "Traceback" not in server.stderr


@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_an_engine_that_dies_while_it_starts(
    launch: Launch, checkpoint: MakeCheckpoint, own_tmp: Path, seconds: float
) -> None:
    server = launch(checkpoint(LONG), env={"TMPDIR": str(own_tmp)}, wait=False)
    end = time.monotonic() + 60
    while not (engines := [child for child in server.children() if "spawn_main" in " ".join(child.cmdline())]):
        assert time.monotonic() < end and server.process.poll() is None, server.stderr
        time.sleep(0.02)
    time.sleep(seconds)
    children = server.children()
    engines[0].kill()
    assert server.wait_for_end(children, status=None, seconds=60) == 1
    assert "Traceback" not in server.stderr and "the engine process ended" in server.stderr
    assert not list(own_tmp.glob("engine-*"))


def test_a_killed_server_leaves_no_files(launch: Launch, checkpoint: MakeCheckpoint, own_tmp: Path) -> None:
    server = launch(checkpoint(LONG), env={"TMPDIR": str(own_tmp)})
    assert list(own_tmp.glob("engine-*"))
    children = server.children()
    server.process.kill()
    server.wait_for_end(children, status=-signal.SIGKILL)
    assert not list(own_tmp.glob("engine-*"))


def test_a_socket_path_that_is_taken(tmp_path: Path) -> None:
    """By a file, or by a server that answers: both stay."""
    file, taken = tmp_path / "file", tmp_path / "taken"
    file.write_text("precious")
    with closing(socket.socket(socket.AF_UNIX)) as other:
        other.bind(str(taken))
        other.listen()
        for path in (file, taken):
            with pytest.raises(ModelLoadError, match=f"cannot listen on {path}: Address already in use"):
                _listen(ServerArgs(uds=str(path)))
        other.settimeout(1)
        other.accept()[0].close()
    assert file.read_text() == "precious" and taken.is_socket()


def test_a_socket_that_was_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with closing(socket.socket(socket.AF_UNIX)) as other:
        other.bind(str(path))
    with closing(_listen(ServerArgs(uds=str(path)))) as listener, closing(socket.socket(socket.AF_UNIX)) as client:
        listener.listen()
        client.connect(str(path))
