import json
import tomllib
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom_common.doctor import cli

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
COORDINATOR = {"listen": "127.0.0.1:0", "insecure": True, "state_dir": "state", "disk_floor_bytes": 0}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command as an installation of this tree has it."""
    entries = PROJECT["entry-points"][cli.GROUP]
    monkeypatch.setattr(cli, "entry_points", lambda group, name: [EntryPoint(name, entries[name], group)])
    monkeypatch.chdir(tmp_path)
    Path("coordinator.yaml").write_text(json.dumps(COORDINATOR))
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments))


def test_the_root_command_has_it():
    module, _, name = PROJECT["entry-points"]["fedloom.commands"]["doctor"].partition(":")

    assert getattr(import_module(module), name) is cli.app


def test_status_and_report_say_that_all_is_well(run):
    done = run("coordinator", "--config", "coordinator.yaml")

    assert done.exit_code == 0, done.output
    assert "no problem" in done.output


def test_a_problem_is_status_1_and_json_tells_it_to_machines(run):
    done = run("coordinator", "--config", "coordinator.yaml", "--json", "--drain-s", "-1")

    assert done.exit_code == 1
    [told] = [item for item in json.loads(done.output) if item["verdict"] == "problem"]
    assert told["part"] == "config"
    assert "drain_s" in told["told"]


def test_a_config_that_is_no_yaml_is_a_problem_and_no_crash(run):
    Path("site.yaml").write_text("a: [")

    done = run("site", "--config", "site.yaml")

    assert done.exit_code == 1
    assert "is not YAML" in done.output
    assert "files may be open" in done.output
