"""Files that arrive in chunks.

How much of a file is held is its size; of one that overwrites another, a small file beside it tells.
"""

import asyncio
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from fedloom_common.chunks import CHUNK_BYTES, Chunk
from fedloom_common.digests import Digest
from fedloom_common.errors import BadChunk
from fedloom_common.files import storage_errors

BATCH_CHUNKS = 4  # written at once by a thread: a hop between threads costs as much as half a chunk's work
_PIECE_BYTES = 1 << 20
_HELD = struct.Struct("<Q")


def held_bytes(path: Path) -> int:
    """Bytes that have come of a file, whole or not."""
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return 0
    if not _mark(path).exists():
        return size_bytes
    mark = _mark(path).read_bytes()
    if len(mark) != _HELD.size:  # cut short by a crash before anything had come
        return 0
    return min(size_bytes, int(_HELD.unpack(mark)[0]))


def overwrite(spare: Path, path: Path) -> None:
    """Have a file arrive in the place of ``spare``, which becomes ``path``: nothing of it is held."""
    _mark(path).write_bytes(_HELD.pack(0))
    spare.replace(path)


def discard(path: Path) -> None:
    """Remove what has come of a file."""
    path.unlink(missing_ok=True)
    _mark(path).unlink(missing_ok=True)


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}.held")


class PartialFile:
    """A file that arrives in chunks, and survives a kill of the process as far as it has come.

    Chunks are checked and written in batches by a thread while the next ones are awaited. Only bytes that
    passed their checksum are written, and what lies there is taken up again. Nothing is synced to disk: a
    power cut may cost bytes, which the digest tells to whoever relies on the file after one.

    Memory: BATCH_CHUNKS chunks, twice.
    """

    def __init__(self, path: Path, size_bytes: int, digest: str) -> None:
        """Take up what is there of a file."""
        self.path = path
        self.size_bytes = size_bytes
        self.digest = digest
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self.offset = held_bytes(path)
        """Place at which the next chunk must begin."""
        if self.offset > size_bytes:
            self._file.truncate(0)
            self.offset = 0
        self._digest = Digest()
        self._digested_bytes = 0
        self._behind: list[Chunk] = []
        self._writing: asyncio.Future[None] | None = None
        self._mark = _mark(path).open("r+b", buffering=0) if _mark(path).exists() else None

    async def add(self, chunk: Chunk) -> None:
        """Take the next chunk in, to be checked and written soon.

        Raises:
            BadChunk: this one is too large, out of order or past the end, or an earlier one was corrupt;
                nothing of it is written, and the file cannot go on.
            StorageFull: the disk is full; what was written before stays.
        """
        if len(chunk.payload) > CHUNK_BYTES:
            raise BadChunk(f"a chunk has {len(chunk.payload)} bytes, the limit is {CHUNK_BYTES}")
        if chunk.offset != self.offset:
            raise BadChunk(f"a chunk begins at byte {chunk.offset}, wanted {self.offset}")
        if chunk.end > self.size_bytes:
            raise BadChunk(f"a chunk ends at byte {chunk.end}, the file has {self.size_bytes}")
        self.offset = chunk.end
        self._behind.append(chunk)
        if len(self._behind) == BATCH_CHUNKS:
            await self._write_on()

    async def finish(self) -> None:
        """Check the whole.

        Raises:
            BadChunk: bytes are missing, or the digest differs (then the file is emptied, to begin again).
        """
        await self._write_on()
        await self._written()
        if self.offset != self.size_bytes:
            raise BadChunk(f"the file ends after {self.offset} of {self.size_bytes} bytes")
        self._begin(self._digest_rest)
        await self._written()
        came = str(self._digest)
        self._file.truncate(self.size_bytes if came == self.digest else 0)
        _mark(self.path).unlink(missing_ok=True)
        if came != self.digest:
            raise BadChunk(f"the file's digest is {came}, wanted {self.digest}; send it again from byte 0")

    async def close(self) -> None:
        """Let the file go after a write that is under way, even if cancelled; what has come stays on disk."""
        closing = asyncio.ensure_future(self._close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await asyncio.wait([closing])
            raise

    async def _close(self) -> None:
        if self._writing is not None:
            await asyncio.wait([self._writing])
        if self._writing is None or self._writing.exception() is None:
            await asyncio.gather(self._begin(self._write, self._behind), return_exceptions=True)
        self._file.close()
        if self._mark is not None:
            self._mark.close()

    async def _write_on(self) -> None:
        """Have what is behind written, as soon as what went before is."""
        await self._written()
        batch, self._behind = self._behind, []
        self._begin(self._write, batch)

    def _begin(self, work: Callable[..., None], *arguments: object) -> asyncio.Future[None]:
        self._writing = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
        return self._writing

    async def _written(self) -> None:
        """Wait for the thread, even when cancelled: the file must not be closed under it."""
        if self._writing is not None:
            await asyncio.shield(self._writing)
            self._writing = None

    def _write(self, batch: Sequence[Chunk]) -> None:
        for chunk in batch:
            chunk.require_intact()
            with storage_errors(self.path, len(chunk.payload)):
                done = 0
                while done < len(chunk.payload):
                    done += os.pwrite(self._file.fileno(), chunk.payload[done:], chunk.offset + done)
            if chunk.offset == self._digested_bytes:
                self._digest.add(chunk.payload)
                self._digested_bytes = chunk.end
            if self._mark is not None:
                os.pwrite(self._mark.fileno(), _HELD.pack(chunk.end), 0)

    def _digest_rest(self) -> None:
        """Read what was taken up: at the end, since chunks that wait for it are lost if the line breaks."""
        piece = memoryview(bytearray(_PIECE_BYTES))
        while rest := piece[: self.size_bytes - self._digested_bytes]:
            count = os.preadv(self._file.fileno(), [rest], self._digested_bytes)
            if not count:
                return  # somebody has cut the file: the digest tells
            self._digest.add(piece[:count])
            self._digested_bytes += count
