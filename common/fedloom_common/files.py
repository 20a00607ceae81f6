"""Files that appear whole or not at all."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedloom_common.errors import StorageFull

FLUSH_S = 0.1


@contextmanager
def atomic_file(path: Path, *, durable: bool = True, over: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write that takes its name only after its bytes are on disk.

    On an error nothing of it stays, and what had the name before is untouched. One that is not ``durable``
    takes its name when it is whole: it survives a kill of the process, and a digest tells after a power cut.
    ``over`` is a file that is used up, if it is there: overwriting it from start to end takes half the time.

    Raises:
        StorageFull: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        reuses = over is not None and over.exists()
        if over is not None and reuses:
            over.replace(partial)
        with storage_errors(path), partial.open("r+b" if reuses else "wb") as file:
            yield file
            file.flush()
            if reuses:
                file.truncate()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
        if durable:
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def clear_partials(folder: Path) -> None:
    """Remove what writers that were killed left of files in a folder; nobody may be writing there now."""
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)


@contextmanager
def flushing(descriptor: int) -> Iterator[None]:
    """Bring what is written inside to disk meanwhile, so that the sync at the end is short.

    Raises:
        OSError: something could not be written. The system tells that once: the sync at the end would not.
    """
    ended, failed = threading.Event(), list[OSError]()

    def flush() -> None:
        try:
            while not ended.wait(FLUSH_S):
                os.fdatasync(descriptor)
        except OSError as error:
            failed.append(error)

    flusher = threading.Thread(target=flush, name="flush", daemon=True)
    flusher.start()
    try:
        yield
    finally:
        ended.set()
        flusher.join()
    if failed:
        raise failed[0]


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def storage_errors(path: Path, wanted_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" inside into an error that says where, and what was wanted.

    Raises:
        StorageFull: the disk, or this user's quota, is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        wanted = "" if wanted_bytes is None else f" for {wanted_bytes} bytes"
        raise StorageFull(f"no space left{wanted} in {path.parent}: free some, or move the folder") from error


def sync_file(path: Path) -> None:
    """Make a file's bytes durable, whoever wrote them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
