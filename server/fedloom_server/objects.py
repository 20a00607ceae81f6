"""Model files in object storage: whatever fsspec reaches by URL, S3 and its like above all.

Calls wait for the network: they are made in threads, never on the event loop.
"""

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from fedloom_common.errors import BadSpec, NotFound, StorageUnavailable

TRIES = 3
PAUSE_S = 1.0

logger = logging.getLogger(__name__)


class Objects:
    """Files by name under a URL."""

    def __init__(self, url: str) -> None:
        """Raises BadSpec if no file system goes by the URL, or its package is missing."""
        try:
            self._storage, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise BadSpec(
                f"model_storage: {error}; wanted a URL that fsspec knows, such as s3://bucket/prefix, with "
                "the package for it (for S3: pip install s3fs)"
            ) from error

    def all(self) -> dict[str, float]:
        """When each file was written, by name."""
        with _failures("list"):
            self._storage.invalidate_cache()
            try:  # not exists(): to many storages a failure is a file that is not there
                found = self._storage.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
        return {
            item["name"].rpartition("/")[2]: _written_at_s(item) for item in found if item["type"] == "file"
        }

    def put(self, path: Path, name: str) -> None:
        """Copy a file in, unless it is there whole.

        Raises:
            StorageUnavailable: the storage did not take it, in several tries.
        """
        size = path.stat().st_size
        for tries_left in reversed(range(TRIES)):
            try:
                with _failures("write"):
                    self._storage.makedirs(self._root, exist_ok=True)
                    self._storage.invalidate_cache()
                    if not self._holds(name, size):
                        self._storage.put_file(str(path), self._key(name))
                    if not self._holds(name, size):  # some storages end short without an error
                        raise OSError(f"{name} has not {size} bytes after it was written")
                return
            except StorageUnavailable:
                if not tries_left:
                    raise
                time.sleep(PAUSE_S)

    def get(self, name: str, into: Path) -> None:
        """Copy a file out; the caller checks its content.

        Raises:
            NotFound: it is not there.
            StorageUnavailable: the storage does not answer.
        """
        with _failures("read"):
            try:
                self._storage.get_file(self._key(name), str(into))
            except FileNotFoundError as error:
                raise NotFound(f"model_storage has no {name}") from error

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""
        with _failures("remove"):
            try:
                self._storage.rm_file(self._key(name))
            except FileNotFoundError:
                return

    def require_answer(self) -> None:
        """Look whether the storage can be reached.

        Raises:
            StorageUnavailable: it cannot.
        """
        with _failures("answer"), suppress(FileNotFoundError):
            self._storage.invalidate_cache()
            self._storage.info(self._root)

    def try_out(self) -> None:
        """Write a file of a few bytes where models go, read it back and remove it.

        Raises:
            StorageUnavailable: one of these fails; its cause is what the storage said.
        """
        name, content = f"trial-{secrets.token_hex(8)}", secrets.token_bytes(16)
        with _failures("write"):
            self._storage.makedirs(self._root, exist_ok=True)
            self._storage.pipe_file(self._key(name), content)
        with _failures("read"):
            if self._storage.cat_file(self._key(name)) != content:
                raise OSError(f"{name} is not what was written")
        with _failures("remove"):
            self._storage.rm_file(self._key(name))

    def _holds(self, name: str, size: int) -> bool:
        try:
            return bool(self._storage.size(self._key(name)) == size)
        except FileNotFoundError:
            return False

    def _key(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turn every error of a storage's own libraries into ours; the details are for the log alone."""
    try:
        yield
    except NotFound:
        raise
    except Exception as error:
        logger.warning("model storage failed", extra={"tried_to": what, "reason": repr(error)})
        raise StorageUnavailable(f"the storage of models cannot {what} now: try again later") from error


def _written_at_s(item: dict[str, Any]) -> float:
    """When a file was written; now, if its storage does not tell: nobody removes it as an old one then."""
    for key in ("LastModified", "mtime", "created", "updated", "last_modified"):
        value = item.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return time.time()
