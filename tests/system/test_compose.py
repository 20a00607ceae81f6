"""Claims about docker-compose.yml, with a real engine: from nothing to a model, with a crash on the way."""

import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
SITES = ("comedies", "histories", "tragedies")
SERVICES = ("coordinator", *SITES)
ROUNDS, STEPS = 3, 6
CRASH_ROUND = 2
BUILD_S = 1800

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3000)]


class Compose:
    """The project of docker-compose.yml under a name of its own, beside one that somebody may use."""

    environment = os.environ | {"COMPOSE_PROJECT_NAME": "fedloom-test"}

    def __call__(self, *arguments: str, status: int | None = 0, timeout_s: float = 300) -> bytes:
        """A command's standard output, or its error if a failure is expected."""
        done = subprocess.run(
            ["docker", "compose", *arguments], check=False, capture_output=True, stdin=subprocess.DEVNULL,
            cwd=ROOT, env=self.environment, timeout=timeout_s,
        )  # fmt: skip
        assert status in (None, done.returncode), (arguments, done.returncode, done.stderr.decode()[-3000:])
        return done.stderr if status else done.stdout

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["docker", "compose", *arguments], cwd=ROOT, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def forget(self) -> None:
        """Remove the containers and volumes, also those of services that only a profile starts."""
        self("--profile", "*", "down", "--volumes", "--remove-orphans")

    def operator(self, *arguments: str) -> Any:
        return json.loads(self("run", "--rm", "-T", "operator", *arguments, "--json"))

    def container(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container."""
        name = self("ps", "--all", "--quiet", service).decode().strip()
        found = subprocess.run(["docker", "inspect", name], check=True, capture_output=True)
        facts: dict[str, Any] = json.loads(found.stdout)[0]
        return facts

    def inside(self, service: str, script: str, status: int | None = 0) -> str:
        return self("exec", "-T", service, "sh", "-c", script, status=status).decode()


@dataclass(frozen=True)
class CrashedRun:
    """A run during which one site's processes were killed."""

    name: str
    exit_status: int
    rounds: list[dict[str, Any]]


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    if reason := _no_engine():
        pytest.skip(f"no Docker engine with compose answers: {reason}")
    compose = Compose()
    compose.forget()
    try:
        compose("up", "--build", "--detach", "--wait", timeout_s=BUILD_S)
        yield compose
    finally:
        compose.forget()


@pytest.fixture(scope="module")
def crashed(compose: Compose) -> CrashedRun:
    """Submits as docs/docker.md says, and kills everything in one site's container while it trains."""
    submit = compose.start(
        "run", "--rm", "-T", "submit", "--set", f"rounds={ROUNDS}", "--set", f"local.steps={STEPS}",
        "--set", "evaluation.max_examples=64",
    )  # fmt: skip
    assert submit.stdout is not None
    name = submit.stdout.readline().strip()
    watch = compose.start("run", "--rm", "-T", "operator", "run", "watch", name, "--json")
    assert watch.stdout is not None
    crashed = False
    for line in watch.stdout:
        event = json.loads(line).get("site_progress")
        if not crashed and event and _trains(event, "comedies", CRASH_ROUND):
            # All but the container's init, which then ends with the daemon's status, as after a crash.
            compose.inside("comedies", "kill -s KILL -- -1", status=None)
            crashed = True
    _, errors = submit.communicate(timeout=100)
    watch.communicate(timeout=100)
    assert crashed, errors[-3000:]
    return CrashedRun(name, submit.returncode, compose.operator("run", "show", name)["rounds"])


def test_services_are_not_root_and_cannot_become_it(compose: Compose) -> None:
    for service in SERVICES:
        status = compose.inside(service, "cat /proc/1/status")
        facts = dict(line.split(":", 1) for line in status.splitlines())
        assert "0" not in facts["Uid"].split(), service
        assert int(facts["CapBnd"], 16) == 0, service
        assert facts["NoNewPrivs"].split() == ["1"], service


def test_each_site_holds_only_its_own_credentials_and_data(compose: Compose) -> None:
    for site in SITES:
        listed = set(compose.inside(site, "ls /config /data").split())
        texts = {path.name for path in (ROOT / "examples/shakespeare/texts" / site).iterdir()}
        assert listed == {"/config:", "ca.crt", "site.crt", "site.key", "site.yaml", "/data:"} | texts
        compose.inside(site, "! touch /config/x && ! touch /data/x && ! touch /x")
    keys = {compose.inside(site, "cat /config/site.key") for site in SITES}
    assert len(keys) == len(SITES)


def test_services_meet_on_one_network_that_has_no_way_out(compose: Compose) -> None:
    for service in SERVICES:
        assert list(compose.container(service)["NetworkSettings"]["Networks"]) == ["fedloom-test_default"]
    inspect = ["docker", "network", "inspect", "fedloom-test_default", "--format", "{{.Internal}}"]
    assert subprocess.run(inspect, check=True, capture_output=True, text=True).stdout.strip() == "true"


def test_a_run_outlives_the_crash_of_a_site(crashed: CrashedRun, compose: Compose) -> None:
    assert compose.container("comedies")["RestartCount"] == 1
    assert crashed.exit_status == 0
    assert [record["state"] for record in crashed.rounds] == ["finished"] * (ROUNDS + 1)
    for record in crashed.rounds[1:]:
        trained = {work["site"]: work["state"] for work in record["sites"] if work["work"] == "train"}
        assert trained == dict.fromkeys(SITES, "done"), record["number"]
    losses = [record["metrics"]["loss"] for record in crashed.rounds]
    assert losses[-1] < losses[0]


def test_an_exported_model_loads_on_the_host(crashed: CrashedRun, compose: Compose, tmp_path: Path) -> None:
    archive = compose("run", "--rm", "-T", "export", crashed.name)
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(tmp_path, filter="data")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / crashed.name)
    tokens = AutoTokenizer.from_pretrained(tmp_path / crashed.name)("To be", return_tensors="pt")
    loss = model(**tokens, labels=tokens["input_ids"]).loss
    assert torch.isfinite(loss)


def test_images_have_the_drivers_of_databases_and_object_storage(compose: Compose) -> None:
    drivers = "import psycopg, s3fs; print(psycopg.pq.version() > 0, s3fs.S3FileSystem.protocol)"
    said = compose("run", "--rm", "-T", "--entrypoint", "python", "coordinator", "-c", drivers)
    assert said.decode().split("\n")[0] == "True ('s3', 's3a')"


def test_an_export_without_a_known_run_says_so_and_writes_no_archive(compose: Compose) -> None:
    assert b"give the id of one run" in compose("run", "--rm", "-T", "export", status=2)
    assert b"no run 'nonsense'" in compose("run", "--rm", "-T", "export", "nonsense", status=2)


def test_a_missing_spec_is_named(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compose.environment, "FEDLOOM_SPEC", "./missing.yaml")
    assert b"missing.yaml" in compose("run", "--rm", "-T", "submit", status=1)


def test_the_gpu_site_starts_only_with_its_profile(compose: Compose) -> None:
    assert b"gpu-site" not in compose("config", "--services").split()
    assert b"gpu-site" in compose("--profile", "gpu", "config", "--services").split()


def test_stopped_services_end_by_themselves_and_keep_their_runs(
    crashed: CrashedRun, compose: Compose
) -> None:
    compose("stop")
    assert {
        service: compose.container(service)["State"]["ExitCode"] for service in SERVICES
    } == dict.fromkeys(SERVICES, 0)
    compose("down")
    compose("up", "--detach", "--wait")
    known = {run["id"]: run["state"] for run in compose.operator("run", "list")}
    assert known == {crashed.name: "finished"}


def _no_engine() -> str:
    """Why compose cannot be used here; empty if it can."""
    for command in (["docker", "compose", "version"], ["docker", "version"]):
        try:
            found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if found.returncode:
            return found.stderr.strip() or f"`{' '.join(command)}` failed"
    return ""


def _trains(progress: dict[str, Any], site: str, number: int) -> bool:
    told = progress["progress"]
    return (progress["site"], progress["round"], told["phase"]) == (site, number, "train") and told[
        "done"
    ] > 0
