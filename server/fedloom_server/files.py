"""Immutable files, named by their digest.

A file is on disk under its final name before the row that names it is
committed, so a row never names a file that is not there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedloom_common.digests import DIGEST, digest_of_file, digest_of_name, is_digest, plain_name
from fedloom_common.errors import NotFound
from fedloom_common.files import sync_file, sync_folder


@dataclass(frozen=True)
class StoredFile:
    """A file in the store."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class KeptFile:
    """A file that is there, whoever names it."""

    digest: str
    written_at_s: float


class Files:
    """Models, the changes that tell them, and assets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, path: Path) -> StoredFile:
        """Take a file into the store, by rename; the same content twice is one file.

        It is synced first: initial models and assets are written by a process that does not.
        """
        stored = StoredFile(digest_of_file(path), path.stat().st_size)
        sync_file(path)
        path.replace(self._place(stored.digest))
        sync_folder(self._folder)
        return stored

    def path(self, digest: str) -> Path:
        """Where a file lies.

        Raises:
            NotFound: the digest is not one, or no such file is kept.
        """
        place = self._place(digest)
        if not place.is_file():
            raise NotFound(f"the coordinator does not keep {digest}")
        return place

    def all(self) -> list[KeptFile]:
        """Every file that is kept."""
        return [
            KeptFile(digest=digest_of_name(path.name), written_at_s=path.stat().st_mtime)
            for path in self._folder.iterdir()
            if is_digest(digest_of_name(path.name))
        ]

    def has(self, digest: str) -> bool:
        """Whether a file is kept."""
        return self._place(digest).is_file()

    def remove(self, digests: Iterable[str]) -> None:
        """Remove files; those that are not there are no error."""
        for digest in digests:
            self._place(digest).unlink(missing_ok=True)

    def _place(self, digest: str) -> Path:
        if not is_digest(digest):
            raise NotFound(f"not a digest: {digest[:100]!r}; wanted {DIGEST}")
        return self._folder / plain_name(digest)
