"""deploy/kubernetes.yaml: what a validator accepts, and what fits the image and the server."""

import copy
import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.image import DEPLOY, END_SECONDS, instruction, server_args
from tests.server.launch import Server

OBJECTS: dict[str, Any] = {
    one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
}
TEMPLATE = OBJECTS["Deployment"]["spec"]["template"]
POD = TEMPLATE["spec"]
[CONTAINER] = POD["containers"]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def validate(one: Any, version: str) -> None:
    kubernetes_validate.validate(one, version, strict=True)


def seconds(probe: str) -> int:
    """That a probe may go on failing."""
    return int(CONTAINER[probe]["periodSeconds"] * CONTAINER[probe]["failureThreshold"])


@pytest.mark.parametrize("version", ["1.25", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", ["PersistentVolumeClaim", "Deployment", "Service", "PodDisruptionBudget"])
def test_a_validator_accepts_it(kind: str, version: str) -> None:
    validate(OBJECTS[kind], version)


def test_a_validator_refuses_a_misspelt_field() -> None:
    wrong = copy.deepcopy(OBJECTS["Deployment"])
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        validate(wrong, kubernetes_validate.latest_version())


def test_nothing_is_left_unchecked() -> None:
    assert OBJECTS.keys() == {"PersistentVolumeClaim", "Deployment", "Service", "PodDisruptionBudget"}


def test_names_fit_one_another() -> None:
    labels = TEMPLATE["metadata"]["labels"].items()
    for selector in (
        OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"],
        OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        OBJECTS["Service"]["spec"]["selector"],
    ):
        assert selector.items() <= labels
    [port], [served] = CONTAINER["ports"], OBJECTS["Service"]["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in POD["volumes"] if "emptyDir" not in volume]
    assert claims == [OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]]


def test_it_fits_the_image() -> None:
    args = server_args(CONTAINER["args"])
    assert CONTAINER["ports"][0]["containerPort"] == args.port == int(instruction("EXPOSE "))
    security = POD["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == instruction("USER ")
    assert security["fsGroup"] == security["runAsGroup"]
    # The root file system is read-only: these are where the server writes.
    paths = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert paths == {instruction(r"\s+HF_HOME="), instruction("WORKDIR (?=/home)"), "/tmp"}


def test_variables_are_those_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        server_args(["--help"])
    known = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", capsys.readouterr().out.rpartition("Environment:")[2]))
    assert {variable["name"] for variable in CONTAINER["env"]} <= known


def test_probes_and_annotations_lead_to_the_server(server: Server) -> None:
    for probe in PROBES:
        assert CONTAINER[probe]["httpGet"]["port"] == CONTAINER["ports"][0]["name"]
        assert CONTAINER[probe]["httpGet"]["path"] == "/health", "the one that tells of an engine that hangs"
    assert server.get("/health").status_code == 200
    notes = TEMPLATE["metadata"]["annotations"]
    assert notes["prometheus.io/port"] == str(CONTAINER["ports"][0]["containerPort"])
    assert "vllm:num_requests_running" in server.get(notes["prometheus.io/path"]).text


def test_a_first_start_has_time() -> None:
    allowed = re.search(r"--start-period=(\d+)m", instruction("HEALTHCHECK "))
    assert allowed is not None
    assert seconds("startupProbe") >= int(allowed[1]) * 60
    assert OBJECTS["Deployment"]["spec"]["progressDeadlineSeconds"] > seconds("startupProbe")


def test_running_requests_may_finish() -> None:
    command, pause = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    needed = float(pause) + server_args(CONTAINER["args"]).shutdown_timeout + END_SECONDS
    assert needed < POD["terminationGracePeriodSeconds"] < 2 * needed


def test_it_gets_one_gpu() -> None:
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1
