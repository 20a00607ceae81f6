"""Files that appear whole or not at all, and their digests."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedloom_common.errors import StorageFull

PIECE_BYTES = 4 << 20


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name only after its bytes are on disk.

    On an error nothing of it stays, and what had the name before is untouched.

    Raises:
        StorageFull: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with storage_errors(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


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


def sync_folder(path: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of_file(path: Path) -> str:
    """The name of a file's content: "sha256:" and 64 hexadecimal digits."""
    with path.open("rb", buffering=0) as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
