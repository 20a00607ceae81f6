"""Files over TransferService: cut into checked chunks, resumed where they broke off.

Both ends use this: the coordinator's Read and the site's upload cut a file
into chunks, the site's download and the coordinator's Write put one together.
"""

import asyncio
import hashlib
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import google_crc32c

from fedloom.v1.transfer_pb2 import Chunk, ReadRequest, Receipt
from fedloom_common.errors import BadChunk, FederationError, Unreachable
from fedloom_common.files import PIECE_BYTES, storage_errors, sync_folder
from fedloom_common.rpc import federation_errors

if TYPE_CHECKING:
    from fedloom.v1.transfer_pb2_grpc import TransferServiceStub

CHUNK_BYTES = (
    1 << 20
)  # smaller costs CPU (64 KiB three times as much), larger makes a slow link less responsive
PATIENCE_S = 600.0  # a transfer that moves no chunk for so long is given up: 1 MiB takes that at 14 kbit/s
RETRY_S = (0.2, 10.0)  # first and longest pause before a broken download goes on

OnBytes = Callable[[int], None]


async def chunks_of(path: Path, offset: int, upload: str = "") -> AsyncIterator[Chunk]:
    """A file's chunks from ``offset`` to its end; the first names the upload.

    Memory: one chunk.
    """
    size = path.stat().st_size
    if not 0 <= offset <= size:
        raise BadChunk(f"offset {offset} lies outside the file of {size} bytes")
    with path.open("rb", buffering=0) as file:
        while offset < size:
            chunk = await asyncio.to_thread(_read_chunk, file.fileno(), offset, upload)
            offset += len(chunk.payload)
            upload = ""
            yield chunk


def _read_chunk(descriptor: int, offset: int, upload: str) -> Chunk:
    payload = os.pread(descriptor, CHUNK_BYTES, offset)
    return Chunk(upload=upload, offset=offset, crc32c=google_crc32c.value(payload), payload=payload)


class PartialFile:
    """A file that arrives in chunks, and survives a crash of the process as far as it has come.

    Only bytes that passed their checksum are written, and what lies there is taken up again. A power cut
    may cost bytes until ``finish``; the digest then tells.
    """

    def __init__(self, path: Path, size_bytes: int, digest: str) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.digest = digest
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._hash = hashlib.sha256()
        self.offset = 0
        """Bytes held: the next chunk must begin here."""

    @classmethod
    async def open(cls, path: Path, size_bytes: int, digest: str) -> Self:
        """Take up what is there of a file."""
        partial = cls(path, size_bytes, digest)
        try:
            await _to_its_end(partial._take_up)
        except BaseException:
            partial.close()
            raise
        return partial

    def _take_up(self) -> None:
        if self.path.stat().st_size > self.size_bytes:
            self._file.truncate(0)
        while piece := self._file.read(PIECE_BYTES):
            self._hash.update(piece)
            self.offset += len(piece)

    async def add(self, chunk: Chunk) -> None:
        """Write the next chunk.

        Raises:
            BadChunk: too large, out of order, past the end or corrupt; nothing of it was written.
            StorageFull: the disk is full; what was written before stays.
        """
        if len(chunk.payload) > CHUNK_BYTES:
            raise BadChunk(f"a chunk has {len(chunk.payload)} bytes, the limit is {CHUNK_BYTES}")
        if chunk.offset != self.offset:
            raise BadChunk(f"a chunk begins at byte {chunk.offset}, wanted {self.offset}")
        if self.offset + len(chunk.payload) > self.size_bytes:
            raise BadChunk(
                f"a chunk ends at byte {self.offset + len(chunk.payload)}, the file has {self.size_bytes}"
            )
        await _to_its_end(self._write, chunk)

    def _write(self, chunk: Chunk) -> None:
        came = google_crc32c.value(chunk.payload)
        if came != chunk.crc32c:
            raise BadChunk(
                f"the chunk at byte {chunk.offset} is corrupt: its CRC-32C is {came:08x}, "
                f"its sender said {chunk.crc32c:08x}"
            )
        with storage_errors(self.path, len(chunk.payload)):
            done = 0
            while done < len(chunk.payload):
                done += os.pwrite(self._file.fileno(), chunk.payload[done:], self.offset + done)
        self._hash.update(chunk.payload)
        self.offset += len(chunk.payload)

    async def finish(self) -> None:
        """Check the whole and make it durable.

        Raises:
            BadChunk: bytes are missing, or the digest differs (then the file is emptied, to begin again).
        """
        if self.offset != self.size_bytes:
            raise BadChunk(f"the file ends after {self.offset} of {self.size_bytes} bytes")
        came = "sha256:" + self._hash.hexdigest()
        if came != self.digest:
            self._file.truncate(0)
            raise BadChunk(f"the file's digest is {came}, wanted {self.digest}; send it again from byte 0")
        await _to_its_end(self._sync)

    def _sync(self) -> None:
        with storage_errors(self.path, self.size_bytes):
            os.fsync(self._file.fileno())
            sync_folder(self.path.parent)

    def close(self) -> None:
        """Let the file go; what has come stays on disk."""
        self._file.close()


async def download(
    stub: "TransferServiceStub", digest: str, size_bytes: int, path: Path, on_bytes: OnBytes | None = None
) -> None:
    """Fetch a file by digest; it takes its name when it is whole, checked and durable.

    A broken stream goes on from the last byte held, and what an earlier call left is taken up.
    ``on_bytes`` hears how many bytes are there.

    Raises:
        Unreachable: no new byte for PATIENCE_S.
        NotFound: the peer has no such file.
        BadChunk: the bytes are not those of the digest.
    """
    partial = await PartialFile.open(path.with_name(f".{path.name}.partial"), size_bytes, digest)
    try:
        await _fetch(stub, partial, on_bytes or (lambda _: None))
        await partial.finish()
        partial.path.replace(path)
        sync_folder(path.parent)
    finally:
        partial.close()


async def _fetch(stub: "TransferServiceStub", partial: PartialFile, on_bytes: OnBytes) -> None:
    pause_s, held, clock = RETRY_S[0], partial.offset, asyncio.get_running_loop().time
    alive_at = clock()
    while partial.offset < partial.size_bytes:
        try:
            with federation_errors("the coordinator"):
                async with asyncio.timeout(PATIENCE_S) as patience:
                    async for chunk in stub.Read(ReadRequest(digest=partial.digest, offset=partial.offset)):
                        await partial.add(chunk)
                        on_bytes(partial.offset)
                        patience.reschedule(clock() + PATIENCE_S)
        except TimeoutError:
            raise Unreachable(f"the coordinator has sent no byte for {PATIENCE_S:g} s") from None
        except Unreachable:
            if partial.offset > held:
                pause_s, held, alive_at = RETRY_S[0], partial.offset, clock()
            if clock() - alive_at > PATIENCE_S:
                raise
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 (jitter, not a secret)
            pause_s = min(pause_s * 2, RETRY_S[1])
        else:
            if partial.offset < partial.size_bytes:
                raise BadChunk(
                    f"the peer sent {partial.offset} of {partial.size_bytes} bytes of {partial.digest}"
                )


async def upload(
    stub: "TransferServiceStub", upload: str, path: Path, offset: int, on_bytes: OnBytes | None = None
) -> Receipt:
    """Send a file from ``offset``, in one attempt; after Unreachable ask QueryWrite from where to go on.

    Raises:
        FederationError: whatever the receiver found wrong, or Unreachable.
        OSError: the file cannot be read.
    """

    found_here: list[Exception] = []  # gRPC would turn it into a mere cancellation

    async def chunks() -> AsyncIterator[Chunk]:
        try:
            if offset == path.stat().st_size:  # all is there already: an empty chunk asks for the receipt
                yield Chunk(upload=upload, offset=offset, crc32c=google_crc32c.value(b""))
            async for chunk in chunks_of(path, offset, upload):
                yield chunk
                patience.reschedule(clock() + PATIENCE_S)
                if on_bytes:
                    on_bytes(chunk.offset + len(chunk.payload))
        except (OSError, BadChunk) as error:
            found_here.append(error)
            raise

    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(PATIENCE_S) as patience:
            with federation_errors("the coordinator"):
                receipt: Receipt = await stub.Write(chunks())
                return receipt
    except TimeoutError:
        raise Unreachable(f"the coordinator has taken no byte for {PATIENCE_S:g} s") from None
    except FederationError:
        if found_here:
            raise found_here[0] from None
        raise


async def _to_its_end(function: Callable[..., None], *arguments: object) -> None:
    """Run in a thread, and wait for its end even when cancelled: a file must not be closed under it."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
