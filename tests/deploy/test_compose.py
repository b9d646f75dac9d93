"""deploy/docker-compose.yml, prometheus.yml and Grafana's provisioning fit one another, the image and the server."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.deploy.image import DEPLOY, END_SECONDS, instruction, server_args

COMPOSE = DEPLOY / "docker-compose.yml"
PROVISIONING = DEPLOY / "grafana" / "provisioning"


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


SERVICES = load(COMPOSE)["services"]


def published(service: str) -> tuple[str, int]:
    """The address of the host, empty for all of them, and the port inside."""
    [ports] = SERVICES[service]["ports"]
    outside, _, inside = ports.rpartition(":")
    return outside.rpartition(":")[0], int(inside)


def mounts(service: str) -> dict[str, str]:
    """Source of each place inside."""
    parts = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {inside: source for source, inside, *_ in parts}


def check(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_keeps_to_the_specification(tmp_path: Path) -> None:
    assert check(COMPOSE).returncode == 0, check(COMPOSE).stdout
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(COMPOSE.read_text(encoding="utf-8").replace("stop_grace_period", "stop_grace"), encoding="utf-8")
    assert "stop_grace" in check(wrong).stdout


def test_the_server_understands_its_flags_and_may_finish() -> None:
    service = SERVICES["server"]
    args = server_args(service["command"])
    assert published("server") == ("", args.port)
    assert int(service["stop_grace_period"].removesuffix("s")) > args.shutdown_timeout + END_SECONDS
    assert instruction(r"\s+HF_HOME=") in mounts("server")
    assert (DEPLOY / service["build"] / "Dockerfile").is_file()


def test_the_server_gets_one_gpu() -> None:
    [device] = SERVICES["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])


def test_what_is_mounted_is_there() -> None:
    volumes = load(COMPOSE)["volumes"]
    for service in SERVICES:
        for source in mounts(service).values():
            assert source in volumes or (source.startswith("./") and (DEPLOY / source).exists()), source


def test_prometheus_reads_the_server() -> None:
    config = load(DEPLOY / "prometheus.yml")
    [job] = config["scrape_configs"]
    [target] = job["static_configs"]
    assert target["targets"] == [f"server:{published('server')[1]}"]
    assert mounts("prometheus")["/etc/prometheus/prometheus.yml"] == "./prometheus.yml"


def test_grafana_reads_prometheus() -> None:
    [source] = load(PROVISIONING / "datasources" / "prometheus.yml")["datasources"]
    url = urlsplit(source["url"])
    assert (url.hostname, url.port) == ("prometheus", published("prometheus")[1])
    assert source["jsonData"]["timeInterval"] == load(DEPLOY / "prometheus.yml")["global"]["scrape_interval"]


def test_grafana_finds_the_dashboard() -> None:
    [provider] = load(PROVISIONING / "dashboards" / "vlm-server.yml")["providers"]
    place = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(place).parent == Path(provider["options"]["path"])
    assert json.loads((DEPLOY / mounts("grafana")[place]).read_text(encoding="utf-8"))["panels"]
    assert mounts("grafana")["/etc/grafana/provisioning"] == "./grafana/provisioning"


@pytest.mark.parametrize("service", ["prometheus", "grafana"])
def test_only_this_machine_reaches(service: str) -> None:
    assert published(service)[0] == "127.0.0.1"


def test_nothing_starts_without_secrets() -> None:
    grafana = SERVICES["grafana"]["environment"]
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    for value in (grafana["GF_SECURITY_ADMIN_PASSWORD"], SERVICES["server"]["environment"]["VLLM_API_KEY"]):
        assert value.startswith("${")
        assert ":?" in value
