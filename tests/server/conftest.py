"""Servers that the tests of one file share."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.conftest import MakeCheckpoint
from tests.server.launch import Launch, Server


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Starts servers; those that still run at the end are stopped, which must go well."""
    servers: list[Server] = []

    def start(model: Path | str, *flags: str, env: Mapping[str, str] | None = None, wait: bool = True) -> Server:
        folder = tmp_path_factory.mktemp("server")
        server = Server.start(folder, "--model", str(model), "--dtype", "float32", "--device", "cpu", *flags, env=env)
        servers.append(server)
        return server.wait_until_serving() if wait else server

    yield start
    running = [server for server in servers if server.process.poll() is None]
    try:
        for server in running:
            server.stop()
    finally:
        for server in running:
            server.kill()


@pytest.fixture(scope="module")
def server(launch: Launch, checkpoint: MakeCheckpoint) -> Server:
    """A server of the default checkpoint under the name `vlm`."""
    return launch(checkpoint(), "--served-model-name", "vlm")
