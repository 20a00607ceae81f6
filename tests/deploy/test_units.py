"""The systemd units, as systemd's own checks see them, and against what they start."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fedloom_client.cli import ENV_PREFIX as CLIENT
from fedloom_client.config import SiteConfig
from fedloom_client.daemon import STOP_S
from fedloom_common.settings import load_fitting
from fedloom_server.cli import ENV_PREFIX as COORDINATOR
from fedloom_server.config import CoordinatorConfig
from fedloom_server.process import FOLD_S

UNITS = Path(__file__).parents[2] / "deploy/systemd"
NAMES = ("fedloom-coordinator.service", "fedloom-site.service")
EXPOSURE = 25  # tenths; systemd calls everything up to 40 "OK"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt install systemd"
)


def settings(name: str) -> dict[str, list[str]]:
    """Values by key; a unit may give a key several times."""
    values: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            values.setdefault(key, []).append(value)
    return values


def environment(name: str) -> dict[str, str]:
    """What the unit puts into the environment."""
    return dict(item.split("=", 1) for line in settings(name)["Environment"] for item in line.split())


def analyze(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"SYSTEMD_COLORS": "0"},
    )  # fmt: skip


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_no_mistake_in_it(name, tmp_path):
    program = tmp_path / "fedloom"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / name
    unit.write_text((UNITS / name).read_text().replace("/opt/fedloom/bin/fedloom", str(program)))

    done = analyze("verify", "--man=no", unit)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_systemd_calls_it_well_contained(name):
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", UNITS / name)

    assert done.returncode == 0, done.stdout[-500:]


@pytest.mark.parametrize(
    ("name", "config", "prefix"),
    [(NAMES[0], CoordinatorConfig, COORDINATOR), (NAMES[1], SiteConfig, CLIENT)],
)
def test_every_variable_that_it_sets_is_a_setting(name, config, prefix, monkeypatch):
    given = {key: value for key, value in environment(name).items() if key.startswith("FEDLOOM")}
    for key, value in given.items():
        monkeypatch.setenv(key, value)

    fitting = load_fitting(config, None, env_prefix=prefix)

    assert given
    for key in given:
        assert key.removeprefix(prefix).lower() in fitting.values


def test_the_coordinator_has_longer_to_stop_than_it_takes_at_most():
    drain_s = float(environment(NAMES[0])["FEDLOOM_COORDINATOR_DRAIN_S"])

    assert float(settings(NAMES[0])["TimeoutStopSec"][0]) > drain_s + FOLD_S


def test_the_site_has_longer_to_stop_than_it_takes_at_most():
    assert float(settings(NAMES[1])["TimeoutStopSec"][0]) > 2 * STOP_S
