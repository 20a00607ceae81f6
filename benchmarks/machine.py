"""The machine under a measurement: what it is, how busy it is, and whether there is room."""

import os
import platform
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from measure import GB, MB

DISK_PIECE_BYTES, DISK_PIECES = 4 * MB, 256  # less would tell of some disks' caches only


def machine_facts(packages: Sequence[str]) -> dict[str, Any]:
    """What figures depend on: processor, memory, kernel, versions, and how busy the machine is now."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "load": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return next(
        int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )


def require_room(folder: Path, *, disk_bytes: int, memory_bytes: int = 0) -> None:
    """Check that a measurement fits on this machine.

    Raises:
        SystemExit: says what is wanted and what is free.
    """
    free_bytes = shutil.disk_usage(folder).free
    short = [
        f"{wanted / GB:.1f} GB of {what}, {free / GB:.1f} GB are free"
        for what, wanted, free in (
            (f"disk in {folder}", disk_bytes, free_bytes),
            ("memory", memory_bytes, available_bytes()),
        )
        if free < wanted
    ]
    if short:
        raise SystemExit(
            f"the measurement needs {' and '.join(short)}: choose smaller --sizes, fewer --sites, or another "
            "folder with --scratch"
        )


def disk_bytes_per_s(folder: Path) -> float:
    """How fast a folder's disk makes a file durable; a round whose models are durable is no faster."""
    piece = bytes(DISK_PIECE_BYTES)
    path = folder / f".fedloom-disk-{os.getpid()}"
    try:
        began_s = time.monotonic()
        with path.open("wb", buffering=0) as file:
            for _ in range(DISK_PIECES):
                file.write(piece)
            os.fsync(file.fileno())
        return DISK_PIECES * len(piece) / (time.monotonic() - began_s)
    finally:
        path.unlink(missing_ok=True)
