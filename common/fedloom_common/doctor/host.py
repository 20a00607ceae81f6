"""This host: where the state lies, the disk under it, and the limits of a process."""

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from fedloom_common.doctor.findings import Finding, ok, problem, warning

OPEN_FILES = 4096  # a site's transfers, a round's updates, and a connection of each peer
SYNCS, SYNC_BYTES = 5, 1 << 20
SLOW_SYNC_S = 0.25
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "glusterfs"})


def state_folder(
    folder: Path, floor_bytes: int, largest_bytes: int = 0, copies: int = 3
) -> Iterator[Finding]:
    """Whether state can be kept here: it is written, outlasts a restart, and has room.

    ``largest_bytes`` is the largest model seen here, of which ``copies`` must fit beside what there is.
    """
    place = _existing(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        yield problem(
            f"{place} cannot be written by user {os.getuid()}", "give it to this user, or choose another"
        )
        return
    yield ok(f"{folder} is there and can be written" if folder.exists() else f"{folder} can be made")
    yield from _file_system(place)
    yield from _room(place, floor_bytes, largest_bytes, copies)
    yield from _speed(place)


def open_files() -> Iterator[Finding]:
    """Whether a process may have enough files and connections open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < OPEN_FILES:
        yield warning(f"{most} files may be open", f"raise it to {OPEN_FILES} (LimitNOFILE=, ulimit -n)")
    else:
        yield ok(f"{'any number of' if most == resource.RLIM_INFINITY else most} files may be open")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _file_system(place: Path) -> Iterator[Finding]:
    kind = _kind(place)
    if kind in MEMORY_FILE_SYSTEMS:
        yield problem(
            f"it lies in memory ({kind}): a restart of the host loses what is finished",
            "put state_dir on a disk",
        )
    elif kind in NETWORK_FILE_SYSTEMS:
        yield warning(
            f"it lies on a network file system ({kind}), whose locks and syncs may not hold",
            "put state_dir on a disk of this host",
        )
    else:
        yield ok(f"it lies on a disk ({kind or 'of an unknown kind'})")


def _room(place: Path, floor_bytes: int, largest_bytes: int, copies: int) -> Iterator[Finding]:
    free_bytes, wanted_bytes = shutil.disk_usage(place).free, largest_bytes * copies
    told, advice = f"{size(free_bytes)} are free", "free some, or put state_dir on another disk"
    if free_bytes < wanted_bytes:
        yield problem(f"{told}, {copies} models of {size(largest_bytes)} need {size(wanted_bytes)}", advice)
    elif free_bytes < floor_bytes:
        yield problem(f"{told}, disk_floor_bytes is {size(floor_bytes)}", advice)
    elif not largest_bytes:
        yield ok(f"{told}; no model has been here yet to compare with")
    else:
        yield ok(f"{told}, {copies} models of {size(largest_bytes)} need {size(wanted_bytes)}")


def _speed(place: Path) -> Iterator[Finding]:
    seconds = []
    with tempfile.TemporaryFile(dir=place) as file:
        for _ in range(SYNCS):
            file.write(os.urandom(SYNC_BYTES))
            file.flush()
            began_s = time.perf_counter()
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - began_s)
    typical_s = statistics.median(seconds)
    told = f"a sync of 1 MiB takes {typical_s * 1000:.3g} ms"
    slow = "each step of a run waits for a few: use a faster disk"
    yield warning(told, slow) if typical_s > SLOW_SYNC_S else ok(told)


def _kind(place: Path) -> str:
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[path] for path in (place, *place.parents) if path in mounts), "")


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
