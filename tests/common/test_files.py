"""Files that appear whole and durable, or not at all."""

import errno
import os
import time
from pathlib import Path

import pytest

from fedloom_common import files
from fedloom_common.errors import StorageFull
from fedloom_common.files import atomic_file, flushing, storage_errors


def test_what_the_disk_says_while_a_file_is_written_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells once of a page that it could not write: the sync at the end says nothing."""
    told = []

    def full(descriptor: int) -> None:
        told.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", full)
    monkeypatch.setattr(files, "FLUSH_S", 0.01)
    path = tmp_path / "model"
    with pytest.raises(StorageFull), storage_errors(path), atomic_file(path) as file, flushing(file.fileno()):
        file.write(b"weights")
        while not told:
            time.sleep(0.01)
    assert not path.exists()
