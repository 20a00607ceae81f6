"""Models and their assets at the site, by digest: each is fetched from the coordinator once."""

import asyncio
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from fedloom_client.assets import are_intact, check_assets
from fedloom_client.messages import Blob, Delta
from fedloom_client.statedir import StateDir
from fedloom_common.codecs.spec import AS_IS, AnyStage
from fedloom_common.digests import digest_of_file, digest_of_name, plain_name
from fedloom_common.errors import FederationError, StorageFull
from fedloom_common.files import storage_errors
from fedloom_common.partial import discard, overwrite
from fedloom_common.threads import until_done

ASSET_FOLDERS_KEPT = 3  # besides those in use
DISK_RESERVE_BYTES = 16 << 20  # logs and status files still fit after a download

OnBytes = Callable[[int], None]
OnProgress = Callable[[int, int], None]
"""Hears how many bytes of how many have come."""

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Where files come from."""

    async def fetch(self, blob: Blob, path: Path, on_bytes: OnBytes) -> None:
        """Bring a file here, whole and checked, or raise."""


class Cache:
    """The files of ``state_dir/models`` and ``state_dir/assets``."""

    def __init__(self, state: StateDir, source: Source, *, models_kept: int, users: int = 1) -> None:
        """``users`` is how many assignments need files at the same time."""
        self._models = state.models
        self._assets = state.assets
        self._source = source
        self._models_kept = models_kept
        self._assets_kept = ASSET_FOLDERS_KEPT + users
        self._intact: set[str] = set()
        self._needed: Counter[str] = Counter()
        self._fetching = asyncio.Lock()  # one after the other: together they would share the same line

    def tidy(self) -> None:
        """Remove what an earlier daemon left of assets; a model that came in part goes on from there."""
        for folder in self._assets.glob(".*"):
            shutil.rmtree(folder)

    def held_digests(self) -> list[str]:
        """Digests of the cached models, newest first."""
        return [digest_of_name(path.stem) for path in self._newest_first()]

    async def model(
        self,
        blob: Blob,
        on_progress: OnProgress,
        *,
        delta: Delta | None = None,
        stages: Sequence[AnyStage] = AS_IS,
    ) -> Path:
        """The model's file, which is fetched if it is not here; older models make room for it.

        If the base of ``delta`` is here, that is fetched instead and decoded by ``stages``.

        Raises:
            StorageFull: the disk has not enough room; nothing of the model stays.
        """
        path = self._place(blob.digest)
        async with self._fetching:
            if not await self._holds(blob, path):
                if not (delta and await self._rebuild(blob, delta, stages, on_progress)):
                    self._make_room(self._models_kept - 1, arriving=_partial(path))
                    require_space(self._models, blob.size_bytes - size_bytes(_partial(path)), "the model")
                    await self._fetch(blob, path, lambda done: on_progress(done, blob.size_bytes))
                self._intact.add(blob.digest)
            path.touch()
            self._make_room(self._models_kept)
        return path

    @contextmanager
    def keeping(self, digest: str) -> Iterator[None]:
        """Drop a model for no other one inside the block."""
        self._needed[digest] += 1
        try:
            yield
        finally:
            self._needed[digest] -= 1

    async def _holds(self, blob: Blob, path: Path) -> bool:
        """Whether the model is here; those of an earlier daemon are checked once."""
        if not path.exists() or blob.digest in self._intact:
            return path.exists()
        if await asyncio.to_thread(digest_of_file, path) == blob.digest:
            self._intact.add(blob.digest)
            return True
        logger.warning("a cached model is spoilt and is fetched again", extra={"digest": blob.digest})
        path.unlink()
        return False

    async def assets(self, blobs: Sequence[Blob]) -> Path:
        """A folder with exactly these files.

        Raises:
            ProtocolError: a name is not plain or not that of an asset, or there is too much.
            StorageFull: the disk has not enough room; nothing of them stays.
        """
        check_assets(blobs)
        listing = json.dumps(sorted((blob.name, blob.digest) for blob in blobs))
        folder = self._assets / hashlib.sha256(listing.encode()).hexdigest()
        async with self._fetching:
            if not await self._holds_folder(blobs, folder):
                await self._fetch_folder(blobs, folder)
                self._intact.add(folder.name)
        folder.touch()
        others = [path for path in self._assets.iterdir() if path != folder]  # whatever the clock says
        for old in sorted(others, key=_age)[max(self._assets_kept - 1, 0) :]:
            shutil.rmtree(old)
        return folder

    async def _rebuild(
        self, blob: Blob, delta: Delta, stages: Sequence[AnyStage], on_progress: OnProgress
    ) -> bool:
        """Make a model from its change, if the base is here; after any failure the whole can still be had."""
        from fedloom_client.downlink import rebuild

        path, base, file = self._place(blob.digest), self._place(delta.base_digest), delta.file
        if not base.exists() or file.size_bytes >= blob.size_bytes:
            return False
        change = path.with_name(f".{path.stem}.delta.partial")
        base.touch()
        self._make_room(max(self._models_kept - 1, 1), arriving=_partial(change))
        try:
            require_space(self._models, blob.size_bytes + file.size_bytes, "the model and its change")
            await self._fetch(file, change, lambda done: on_progress(done, file.size_bytes))
            await until_done(
                rebuild, blob, path, delta=change, stages=stages, base=base, base_digest=delta.base_digest
            )
        except (FederationError, OSError) as error:
            facts = {"digest": blob.digest, "error": str(error)}
            logger.warning("a model's change is of no use; fetching the whole model", extra=facts)
            return False
        finally:
            change.unlink(missing_ok=True)
        return True

    async def _holds_folder(self, blobs: Sequence[Blob], folder: Path) -> bool:
        """Whether the assets are here; those of an earlier daemon are checked once."""
        if not folder.exists() or folder.name in self._intact:
            return folder.exists()
        if await asyncio.to_thread(are_intact, blobs, folder):
            self._intact.add(folder.name)
            return True
        logger.warning("cached assets are spoilt and are fetched again", extra={"folder": folder.name})
        shutil.rmtree(folder)
        return False

    async def _fetch_folder(self, blobs: Sequence[Blob], folder: Path) -> None:
        require_space(self._assets, sum(blob.size_bytes for blob in blobs), "the model's assets")
        arriving = folder.with_name(f".{folder.name}")
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.mkdir()
        try:
            for blob in blobs:
                await self._fetch(blob, arriving / blob.name, lambda _: None)
            arriving.rename(folder)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)

    async def _fetch(self, blob: Blob, path: Path, on_bytes: OnBytes) -> None:
        try:
            with storage_errors(path, blob.size_bytes):
                await self._source.fetch(blob, path, on_bytes)
        except StorageFull as error:
            discard(_partial(path))
            raise StorageFull(f"{blob.name} of {blob.size_bytes} bytes: {error}") from error

    def _make_room(self, kept: int, arriving: Path | None = None) -> None:
        """Drop all but the newest models; a new one that is to arrive overwrites the last of them."""
        for partial in self._models.glob(".*.partial"):
            if partial != arriving:
                discard(partial)
        for path in self._newest_first()[kept:]:
            if self._needed[digest_of_name(path.stem)]:
                continue
            logger.debug("an old model is dropped", extra={"digest": digest_of_name(path.stem)})
            if arriving is not None and not arriving.exists():
                overwrite(path, arriving)
            else:
                path.unlink()

    def _place(self, digest: str) -> Path:
        return self._models / f"{plain_name(digest)}.safetensors"

    def _newest_first(self) -> list[Path]:
        return sorted(self._models.glob("*.safetensors"), key=_age)


def require_space(folder: Path, wanted_bytes: int, what: str) -> None:
    """Check that something fits on a folder's disk before work goes into it.

    Raises:
        StorageFull: names the folder, what is wanted and what is free.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < wanted_bytes + DISK_RESERVE_BYTES:
        raise StorageFull(
            f"no space left in {folder}: {wanted_bytes} bytes are wanted for {what} and {DISK_RESERVE_BYTES} "
            f"to spare, {free_bytes} are free; free some, or move state_dir"
        )


def _partial(path: Path) -> Path:
    """Where a download keeps what has come."""
    return path.with_name(f".{path.name}.partial")


def size_bytes(path: Path) -> int:
    """Size of a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def _age(path: Path) -> float:
    return -path.stat().st_mtime_ns
