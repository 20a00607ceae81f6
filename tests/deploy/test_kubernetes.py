"""The Kubernetes manifests: valid by the API's schemas, and of one mind with images and configs."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from fedloom_client.cli import ENV_PREFIX as CLIENT
from fedloom_client.config import SiteConfig
from fedloom_client.daemon import STOP_S
from fedloom_common.settings import load_settings
from fedloom_server.cli import ENV_PREFIX as COORDINATOR
from fedloom_server.config import CoordinatorConfig
from fedloom_server.process import FOLD_S

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy/kubernetes"
VERSIONS = ("1.30", "1.35")
DOCKERFILES = {"fedloom-coordinator": "server/Dockerfile", "fedloom-client": "client/Dockerfile"}
TLS = {"ca": "/config/ca.crt", "certificate": "/config/x.crt", "key": "/config/x.key"}


def build(folder: Path) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed, whose kustomize puts the manifests together")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def federation() -> list[dict[str, Any]]:
    return build(MANIFESTS / "example")


@pytest.fixture(params=["fedloom-coordinator", "fedloom-site-a", "fedloom-site-b"])
def pod(federation, request) -> dict[str, Any]:
    """The pod of one of the three workloads."""
    [found] = [
        item for item in federation
        if item["kind"] in ("StatefulSet", "Deployment") and item["metadata"]["name"] == request.param
    ]  # fmt: skip
    return found["spec"]["template"]["spec"]


@pytest.fixture
def container(pod) -> dict[str, Any]:
    [only] = pod["containers"]
    return only


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container["env"]}


def docker(image: str, instruction: str) -> str:
    text = (ROOT / DOCKERFILES[image.partition(":")[0]]).read_text()
    return re.findall(rf"^{instruction} (.*)", text, re.MULTILINE)[-1]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_what_the_api_takes(federation, version):
    assert len(federation) == 10
    for item in federation:
        kubernetes_validate.validate(item, version, strict=True)


def test_a_mistake_would_be_found(federation):
    [state] = [item for item in federation if item["kind"] == "StatefulSet"]
    state["spec"]["template"]["spec"]["containers"][0]["readOnly"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(state, VERSIONS[0], strict=True)
    del state["spec"]["template"]["spec"]["containers"][0]["readOnly"]


def test_it_is_nobody_special_and_writes_only_where_it_must(pod, container):
    uid = pod["securityContext"]["runAsUser"]
    assert docker(container["image"], "ARG") == f"UID={uid}"
    assert pod["securityContext"]["fsGroup"] == uid
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod["automountServiceAccountToken"]
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert {"/state", "/tmp"} <= writable <= {"/state", "/tmp", "/dev/shm"}
    assert "limits" in container["resources"]


def test_the_image_s_command_gets_what_its_config_takes(container, monkeypatch):
    given = variables(container)
    is_coordinator = container["args"] == ["coordinator"]
    prefix, config = (COORDINATOR, CoordinatorConfig) if is_coordinator else (CLIENT, SiteConfig)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(prefix + "TLS", str(TLS).replace("'", '"'))
    if not is_coordinator:
        monkeypatch.setenv(prefix + "COORDINATOR", "fedloom-coordinator:7443")

    settings = load_settings(config, None, env_prefix=prefix)

    assert docker(container["image"], "ENTRYPOINT") == '["fedloom"]'
    assert docker(container["image"], "CMD") == f'["{container["args"][0]}"]'
    assert f"{prefix}CONFIG={given[prefix + 'CONFIG']}" in docker(container["image"], "ENV")
    assert str(settings.state_dir) == "/state"


def test_probes_ask_pages_that_there_are_on_the_port_of_the_config(container):
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    [http] = [value for name, value in variables(container).items() if name.endswith("_HTTP")]
    assert ports["http"] == int(http.rpartition(":")[2])
    for name, path in (
        ("startupProbe", "/healthz"),
        ("livenessProbe", "/healthz"),
        ("readinessProbe", "/readyz"),
    ):
        assert container[name]["httpGet"] == {"path": path, "port": "http", "scheme": "HTTPS"}


def test_it_has_longer_to_end_than_it_takes_at_most(pod, container):
    drain_s = float(variables(container).get("FEDLOOM_COORDINATOR_DRAIN_S", 2 * STOP_S - FOLD_S))

    assert pod["terminationGracePeriodSeconds"] > drain_s + FOLD_S


def test_services_and_policies_choose_the_pods_that_are_meant(federation):
    labels = {
        item["metadata"]["name"]: item["spec"]["template"]["metadata"]["labels"]
        for item in federation
        if item["kind"] in ("StatefulSet", "Deployment")
    }
    chosen = {}
    for item in federation:
        if item["kind"] == "Service":
            chosen["service"] = item["spec"]["selector"]
        if item["kind"] == "NetworkPolicy":
            chosen[item["metadata"]["name"]] = item["spec"]["podSelector"]["matchLabels"]

    def pods(selector: dict[str, str]) -> list[str]:
        return [name for name, given in labels.items() if selector.items() <= given.items()]

    assert {name: pods(selector) for name, selector in chosen.items()} == {
        "service": ["fedloom-coordinator"],
        "fedloom-coordinator": ["fedloom-coordinator"],
        "fedloom-site-a": ["fedloom-site-a"],
        "fedloom-site-b": ["fedloom-site-b"],
    }


def test_each_site_has_a_secret_a_state_and_data_of_its_own(federation):
    sites = [item["spec"]["template"]["spec"] for item in federation if item["kind"] == "Deployment"]
    claims = {item["metadata"]["name"] for item in federation if item["kind"] == "PersistentVolumeClaim"}
    secrets = [
        volume["secret"]["secretName"] for site in sites for volume in site["volumes"] if "secret" in volume
    ]
    used = [
        volume["persistentVolumeClaim"]["claimName"]
        for site in sites for volume in site["volumes"] if "persistentVolumeClaim" in volume
    ]  # fmt: skip

    assert len(set(secrets)) == len(secrets) == 2
    assert len(set(used)) == len(used) == 4
    assert claims == {"fedloom-site-state-a", "fedloom-site-state-b"} <= set(used)


def test_with_the_gpu_component_a_site_asks_for_a_gpu_and_trains_nowhere_else(tmp_path):
    shutil.copytree(MANIFESTS, tmp_path / "k")
    overlay = tmp_path / "k/example/site-a/kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("# components:", "components:"))

    [site] = [item for item in build(overlay.parent) if item["kind"] == "Deployment"]

    [container] = site["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert variables(container)["FEDLOOM_CLIENT_WORKERS__DEVICE"] == "cuda"
    kubernetes_validate.validate(site, VERSIONS[0], strict=True)
