"""What this host has, found without torch: the daemon stays small while no work is under way."""

import glob
import logging
import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from fedloom_client.config import DataSource

NVIDIA_SMI_TIMEOUT_S = 20  # a driver that hangs must not keep the site from attaching
MIB = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device on which a rank can train."""

    kind: Literal["cpu", "cuda"]
    name: str
    """The maker's name."""
    memory_bytes: int
    """0 for the CPU, whose memory is the host's."""


def find_devices(wanted: Literal["auto", "cpu", "cuda"]) -> tuple[Device, ...]:
    """The devices that training would use: every GPU, or the CPU where there is none."""
    gpus = () if wanted == "cpu" else _gpus()
    return gpus or (Device(kind="cpu", name=_cpu_name(), memory_bytes=0),)


def main_memory_bytes() -> int:
    """Main memory of the host."""
    return int(psutil.virtual_memory().total)


def data_set_bytes(source: DataSource) -> int:
    """Size of what training would read now: files that the globs match, or folders of saved datasets."""
    paths = {match for pattern in source.files for match in glob.glob(pattern, recursive=True)}  # noqa: PTH207
    if source.format == "dataset":
        return sum(map(_size_bytes, {file for path in paths for file in _files_below(path)}))
    return sum(_size_bytes(Path(path)) for path in paths)


def _files_below(path: str) -> Iterator[Path]:
    """What goes meanwhile or is not ours to enter has none."""
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)


def _size_bytes(path: Path) -> int:
    try:
        facts = path.stat()
    except OSError:  # gone since it was listed, or not ours to read: training will say so
        return 0
    return facts.st_size if stat.S_ISREG(facts.st_mode) else 0


def _gpus() -> tuple[Device, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        ).stdout
        return tuple(_gpu(line) for line in listing.splitlines() if "," in line)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nvidia-smi lists no devices", extra={"error": str(error)})
        return ()


def _gpu(line: str) -> Device:
    name, _, memory_mib = line.rpartition(",")
    # Chips that share the host's memory say "[N/A]".
    memory_bytes = int(memory_mib) * MIB if memory_mib.strip().isdigit() else 0
    return Device(kind="cuda", name=name.strip(), memory_bytes=memory_bytes)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
