"""Immutable files, named by their digest.

A file is on disk under its final name, and in the object storage if there is one, before the row that
names it is committed, so a row never names a file that is not there. With an object storage the disk is
a cache: what nobody works with leaves it when there is more than it may hold.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedloom_common.digests import DIGEST, digest_of_file, digest_of_name, is_digest, plain_name
from fedloom_common.errors import NotFound, StorageUnavailable
from fedloom_common.files import storage_errors, sync_file, sync_folder
from fedloom_common.threads import until_done
from fedloom_server.objects import Objects

YOUNG_S = 600.0  # longer than it takes until a row names what was put, or a download begins
FETCHED = ".fetched"

logger = logging.getLogger(__name__)


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

    def __init__(self, folder: Path, objects: Objects | None = None, cache_bytes: int | None = None) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{FETCHED}"):
            path.unlink()  # a kill cut the fetch short
        self._objects = objects
        self._cache_bytes = cache_bytes
        self._stored = objects.all() if objects else {}
        """What the storage holds, by name: we alone write to it."""
        self._doomed: set[str] = set()
        self._changing = threading.Lock()
        self._keeping = 0
        self._kept: set[str] = set()
        """Digests that a row is to name which has yet to be saved."""
        self._removing = threading.Lock()
        self._fetching: dict[str, asyncio.Lock] = {}
        self._sweeper = ThreadPoolExecutor(1, "files")

    def close(self) -> None:
        """Wait for what is being removed."""
        self._sweeper.shutdown(cancel_futures=True)

    @contextmanager
    def keeping(self) -> Iterator[set[str]]:
        """Remove nothing inside that is put, or that the caller adds by its digest: its row comes last.

        Rows of others may have named the same content, and have it removed meanwhile.
        """
        self._keeping += 1
        try:
            yield self._kept
        finally:
            self._keeping -= 1
            if not self._keeping:
                self._kept.clear()

    def put(self, path: Path) -> StoredFile:
        """Take a file into the store, by rename; the same content twice is one file.

        It is synced first: initial models and assets are written by a process that does not.

        Raises:
            StorageUnavailable: the object storage did not take it; putting it again completes it.
        """
        stored = StoredFile(digest_of_file(path), path.stat().st_size)
        place = self._place(stored.digest)
        sync_file(path)
        with self._removing:
            if self._keeping:
                self._kept.add(stored.digest)
        path.replace(place)
        sync_folder(self._folder)
        if self._objects is not None:
            with self._changing:
                self._doomed.discard(place.name)
                self._objects.put(place, place.name)
                self._stored[place.name] = time.time()
        return stored

    def path(self, digest: str) -> Path:
        """Where a file lies on disk.

        Raises:
            NotFound: the digest is not one, or no such file is on disk.
        """
        place = self._place(digest)
        if not place.is_file():
            raise NotFound(
                f"the coordinator does not keep {digest}; if its records come from a backup, put the files "
                "of that backup back, and resume the run"
            )
        return place

    async def bring(self, digest: str) -> Path:
        """Where a file lies on disk, once it has been fetched there.

        Raises:
            NotFound: the digest is not one, or no such file is kept.
            StorageUnavailable: it is not on disk, and the object storage does not give it, or gives another.
        """
        place = self._place(digest)
        if place.name in self._stored and not place.is_file():
            async with self._fetching.setdefault(digest, asyncio.Lock()):
                if not place.is_file():
                    await until_done(self._fetch, digest, place)
            self._fetching.pop(digest, None)
        return self.path(digest)

    def has(self, digest: str) -> bool:
        """Whether a file is kept."""
        place = self._place(digest)
        return place.is_file() or place.name in self._stored

    def require_answer(self) -> None:
        """Look whether the object storage can be reached, if there is one.

        Raises:
            StorageUnavailable: it cannot.
        """
        if self._objects is not None:
            self._objects.require_answer()

    def all(self) -> list[KeptFile]:
        """Every file that is kept."""
        written = {path.name: path.stat().st_mtime for path in self._folder.iterdir()}
        names = {name: digest_of_name(name) for name in self._stored | written}
        return [
            KeptFile(digest=digest, written_at_s=written.get(name) or self._stored[name])
            for name, digest in names.items()
            if is_digest(digest)
        ]

    def remove(self, digests: Iterable[str]) -> None:
        """Remove files, from the object storage a little later; those that are not there are no error.

        One that is kept is passed over: whoever has it removed comes by again.
        """
        for digest in digests:
            place = self._place(digest)
            with self._removing:
                if digest in self._kept:
                    continue
                place.unlink(missing_ok=True)
            if self._stored.pop(place.name, None) is not None:
                self._doomed.add(place.name)
                self._sweeper.submit(self._sweep, place.name)

    @property
    def is_cache(self) -> bool:
        """Whether the disk may hold less than what is kept."""
        return self._cache_bytes is not None

    def trim(self, in_use: Iterable[str]) -> None:
        """Take files that the object storage holds off the disk, oldest first, if the cache is too full."""
        if self._cache_bytes is None:
            return
        wanted = {plain_name(digest) for digest in (*in_use, *self._kept)}
        held = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # a fetch has just ended, and renamed it
                status = path.stat()
                held.append((status.st_mtime, status.st_size, path))
        held.sort()
        too_many_bytes = sum(size for _, size, _ in held) - self._cache_bytes
        for written_at_s, size, path in held:
            is_young = time.time() - written_at_s < YOUNG_S
            if too_many_bytes > 0 and path.name in self._stored and path.name not in wanted and not is_young:
                path.unlink(missing_ok=True)
                too_many_bytes -= size

    def _fetch(self, digest: str, place: Path) -> None:
        assert self._objects is not None, "what is stored, is stored there"
        fetched = place.with_name(place.name + FETCHED)
        try:
            with storage_errors(place):
                self._objects.get(place.name, fetched)
            if (came := digest_of_file(fetched)) != digest:
                logger.error("model storage gives another file", extra={"wanted": digest, "came": came})
                raise StorageUnavailable(f"the storage of models gives {came} for {digest}")
            sync_file(fetched)
            fetched.replace(place)
        finally:
            fetched.unlink(missing_ok=True)

    def _sweep(self, name: str) -> None:
        """Remove a file from the storage, unless it was put there again meanwhile."""
        assert self._objects is not None, "what is stored, is stored there"
        try:
            with self._changing:
                if name in self._doomed:
                    self._objects.remove(name)
                    self._doomed.discard(name)
        except StorageUnavailable:
            logger.warning("a file stays in the model storage until the next start", extra={"file": name})

    def _place(self, digest: str) -> Path:
        if not is_digest(digest):
            raise NotFound(f"not a digest: {digest[:100]!r}; wanted {DIGEST}")
        return self._folder / plain_name(digest)
