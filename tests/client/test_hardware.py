"""What the host has."""

import os
from pathlib import Path
from typing import Any

import pytest

from fedloom_client.config import DataSource
from fedloom_client.hardware import data_set_bytes, find_devices


@pytest.fixture
def path_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is searched for commands."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def nvidia_smi(folder: Path, script: str) -> None:
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)


def test_every_gpu_is_listed_with_its_memory(path_with: Path) -> None:
    nvidia_smi(
        path_with, "echo 'NVIDIA H100 80GB HBM3, 81559'; echo 'Tesla, T4, 15360'; echo 'NVIDIA GB10, [N/A]'"
    )
    devices = find_devices("auto")
    assert [(device.kind, device.name, device.memory_bytes) for device in devices] == [
        ("cuda", "NVIDIA H100 80GB HBM3", 81559 * 1024 * 1024),
        ("cuda", "Tesla, T4", 15360 * 1024 * 1024),
        ("cuda", "NVIDIA GB10", 0),
    ]


def test_a_site_that_trains_on_the_cpu_lists_no_gpus(path_with: Path) -> None:
    nvidia_smi(path_with, "echo 'NVIDIA H100 80GB HBM3, 81559'")
    assert [device.kind for device in find_devices("cpu")] == ["cpu"]


def test_a_driver_without_devices_leaves_the_cpu(path_with: Path) -> None:
    nvidia_smi(path_with, "echo 'No devices were found'")
    assert [device.kind for device in find_devices("auto")] == ["cpu"]


def test_a_driver_that_does_not_work_is_logged_and_leaves_the_cpu(
    path_with: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nvidia_smi(path_with, "exit 9")
    (device,) = find_devices("auto")
    assert (device.kind, device.memory_bytes) == ("cpu", 0)
    assert device.name
    assert "lists no devices" in caplog.text


def test_without_nvidia_smi_the_cpu_is_listed_quietly(
    path_with: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [device.kind for device in find_devices("auto")] == ["cpu"]
    assert caplog.text == ""


def test_a_data_set_has_the_size_of_its_files_each_counted_once(tmp_path: Path) -> None:
    (tmp_path / "saved" / "deep").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("four")
    (tmp_path / "saved" / "state.json").write_text("12345")
    (tmp_path / "saved" / "deep" / "data.arrow").write_text("1234567")
    patterns = (str(tmp_path / "*.txt"), str(tmp_path / "a.*"))
    assert data_set_bytes(DataSource(files=patterns)) == 4
    saved = (str(tmp_path / "saved"), str(tmp_path / "s*"))
    assert data_set_bytes(DataSource(files=saved, format="dataset")) == 5 + 7
    assert data_set_bytes(DataSource(files=(str(tmp_path / "none*"),))) == 0


def test_what_training_does_not_read_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("four")
    assert data_set_bytes(DataSource(files=(str(tmp_path / "data"),))) == 0
    assert data_set_bytes(DataSource(files=(str(tmp_path / "data" / "a.txt"),), format="dataset")) == 0


def test_a_link_that_cannot_be_followed_counts_nothing(tmp_path: Path) -> None:
    """Root may enter every folder, so here the link leads to a name that no folder could have."""
    (tmp_path / "a.txt").write_text("four")
    (tmp_path / "b.txt").symlink_to("x" * 300)
    assert data_set_bytes(DataSource(files=(str(tmp_path / "*.txt"),))) == 4


def test_a_folder_that_goes_while_it_is_measured_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved" / "going").mkdir(parents=True)
    (tmp_path / "saved" / "state.json").write_text("12345")
    scandir = os.scandir

    def remove_then_scan(path: Any) -> Any:
        if Path(path).name == "going":
            Path(path).rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", remove_then_scan)
    assert data_set_bytes(DataSource(files=(str(tmp_path / "saved"),), format="dataset")) == 5
    assert not (tmp_path / "saved" / "going").exists()
