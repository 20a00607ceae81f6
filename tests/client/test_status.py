"""What the health check makes of the status file."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedloom_client.status import Status, ill_health


def write(path: Path, **changes: Any) -> None:
    facts = {"attached": True, "site": "oslo", "heartbeat_s": 10, "pid": os.getpid(), "at_s": time.time()}
    path.write_text(json.dumps(facts | changes))


def test_a_daemon_that_was_attached_a_moment_ago_is_well(tmp_path: Path) -> None:
    Status(tmp_path / "status.json").attached("oslo", 10)
    assert ill_health(tmp_path / "status.json") is None


def test_a_status_older_than_three_heartbeats_is_ill_health(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write(path, at_s=time.time() - 29)
    assert ill_health(path) is None
    write(path, at_s=time.time() - 31)
    assert "silent for 31 s" in str(ill_health(path))


def test_a_detached_daemon_says_why(tmp_path: Path) -> None:
    Status(tmp_path / "status.json").detached("nobody answers")
    assert ill_health(tmp_path / "status.json") == "the client daemon is not attached: nobody answers"


def test_a_process_that_is_gone_is_ill_health(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write(tmp_path / "status.json", pid=gone.pid)
    assert "is gone" in str(ill_health(tmp_path / "status.json"))


def test_a_status_that_is_no_json_is_ill_health(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{")
    assert "cannot be read" in str(ill_health(tmp_path / "status.json"))


def test_a_full_disk_under_the_status_file_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Status(tmp_path / "missing" / "status.json").attached("oslo", 10)
    assert "cannot be written" in caplog.text
