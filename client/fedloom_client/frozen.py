"""What lies under an adapter, at the site: the frozen base, and what rounds have folded into it.

A base is looked for in the site's own directories, then among those downloaded before; folds belong to
one run and go with its other files.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedloom_client.cache import Source, require_space, size_bytes
from fedloom_client.localmodels import LocalModels
from fedloom_client.messages import Assignment, Blob
from fedloom_client.statedir import StateDir
from fedloom_common.digests import digest_of_file, plain_name
from fedloom_common.errors import StorageFull
from fedloom_common.files import storage_errors
from fedloom_common.partial import discard

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FrozenFiles:
    """Where they are."""

    frozen: dict[str, str] = field(default_factory=dict)
    """Paths by the names that the coordinator gives the files."""
    folds: tuple[str, ...] = ()
    """Paths, first to last."""


class Frozen:
    """The files of ``state_dir/frozen`` and of the runs' folders, and those of the site's own directories."""

    def __init__(self, state: StateDir, source: Source, local: LocalModels, *, kept: int) -> None:
        """``kept`` is how many downloaded files stay when no assignment needs them."""
        self._state, self._source, self._local, self._kept = state, source, local, kept
        self._intact: set[Path] = set()
        self._needed: Counter[str] = Counter()
        self._fetching = asyncio.Lock()

    async def bring(self, assignment: Assignment, on_progress: Callable[[int, int], None]) -> FrozenFiles:
        """All that lies under an assignment's adapter; what is not here is fetched, once.

        Raises:
            StorageFull: the disk has not enough room; nothing of the file stays.
        """
        if not assignment.frozen and not assignment.folds:
            return FrozenFiles()
        folder = self._state.fold_folder(assignment.run_id)
        async with self._fetching:
            frozen = {blob.name: str(await self._frozen(blob, on_progress)) for blob in assignment.frozen}
            folds = [folder / f"{plain_name(blob.digest)}.safetensors" for blob in assignment.folds]
            for blob, path in zip(assignment.folds, folds, strict=True):
                await self._have(blob, path, on_progress)
            _drop_others(folder, folds)
            self._make_room()
        return FrozenFiles(frozen=frozen, folds=tuple(map(str, folds)))

    @contextmanager
    def keeping(self, blobs: Sequence[Blob]) -> Iterator[None]:
        """Drop none of these files inside the block."""
        names = [plain_name(blob.digest) for blob in blobs]
        self._needed.update(names)
        try:
            yield
        finally:
            self._needed.subtract(names)

    async def _frozen(self, blob: Blob, on_progress: Callable[[int, int], None]) -> Path:
        from fedloom_common.adapters.layout import FROZEN_A_FILE  # here: it brings numpy, an idle daemon none

        is_published = blob.name != FROZEN_A_FILE  # which the coordinator has drawn
        if is_published and (own := await self._local.find(blob.digest, blob.size_bytes)) is not None:
            return own
        path = self._state.frozen / f"{plain_name(blob.digest)}.safetensors"
        await self._have(blob, path, on_progress)
        path.touch()
        return path

    async def _have(self, blob: Blob, path: Path, on_progress: Callable[[int, int], None]) -> None:
        """Fetch a file that is not here; those of an earlier daemon are checked once."""
        is_unchecked = path.exists() and path not in self._intact
        if is_unchecked and await asyncio.to_thread(digest_of_file, path) != blob.digest:
            logger.warning("a frozen file is spoilt and is fetched again", extra={"path": str(path)})
            path.unlink()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            require_space(path.parent, blob.size_bytes - size_bytes(partial), blob.name)
            try:
                with storage_errors(path, blob.size_bytes):
                    await self._source.fetch(blob, path, lambda done: on_progress(done, blob.size_bytes))
            except StorageFull:
                discard(partial)
                raise
        self._intact.add(path)

    def _make_room(self) -> None:
        folder = self._state.frozen
        found = [*folder.glob("*.safetensors"), *folder.glob(".*.safetensors.partial")]
        found.sort(key=lambda path: -path.stat().st_mtime_ns)
        for path in found[self._kept :]:
            if not self._needed[path.name.removeprefix(".").partition(".")[0]]:
                discard(path)
                self._intact.discard(path)


def _drop_others(folder: Path, wanted: Sequence[Path]) -> None:
    """Remove a run's folds that its newest model no longer needs."""
    for path in folder.glob("*.safetensors") if folder.exists() else ():
        if path not in wanted:
            path.unlink()
