"""Files over TransferService: cut into checked chunks, resumed where they broke off.

Both ends use this: the coordinator's Read and the site's upload cut a file
into chunks, the site's download and the coordinator's Write put one together.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from fedloom.v1.transfer_pb2 import QueryWriteRequest, QueryWriteResponse, ReadRequest, Receipt
from fedloom_common.chunks import CHUNK_BYTES, Chunk
from fedloom_common.errors import BadChunk, FederationError, Unreachable
from fedloom_common.pace import Pace
from fedloom_common.partial import PartialFile
from fedloom_common.rpc import federation_errors

SERVICE = "fedloom.v1.TransferService"
STALL_S = 600.0  # a transfer that moves no chunk for so long is given up: 1 MiB takes that at 14 kbit/s
AHEAD_CHUNKS = 4  # read by a thread at once, while others are sent
SMALLEST_CHUNK_BYTES = 1 << 16
BREAK_SHARE = 64
RETRY_S = (0.2, 10.0)  # first and longest pause before a broken download goes on

OnBytes = Callable[[int], None]


class TransferStub:
    """The calls of TransferService, with chunks as bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.read: Any = channel.unary_stream(f"/{SERVICE}/Read", ReadRequest.SerializeToString)
        self.write: Any = channel.stream_unary(f"/{SERVICE}/Write", None, Receipt.FromString)
        self.query_write: Any = channel.unary_unary(
            f"/{SERVICE}/QueryWrite", QueryWriteRequest.SerializeToString, QueryWriteResponse.FromString
        )


def transfer_handlers(read: Any, write: Any, query_write: Any) -> grpc.GenericRpcHandler:
    """The methods of TransferService for a server, with chunks as bytes."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Read": grpc.unary_stream_rpc_method_handler(read, ReadRequest.FromString),
        "Write": grpc.stream_unary_rpc_method_handler(write, None, Receipt.SerializeToString),
        "QueryWrite": grpc.unary_unary_rpc_method_handler(
            query_write, QueryWriteRequest.FromString, QueryWriteResponse.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


async def messages_of(
    path: Path,
    offset: int,
    upload: str = "",
    *,
    ahead_chunks: int = AHEAD_CHUNKS,
    most_bytes: int = CHUNK_BYTES,
) -> AsyncIterator[tuple[int, bytes]]:
    """A file's chunks from ``offset`` to its end, encoded, each with the place behind it in the file.

    The first names the upload; none is larger than ``most_bytes``. A thread reads ahead.

    Memory: ``ahead_chunks``, twice.

    Raises:
        BadChunk: the offset lies outside the file, or the file was cut while it was read.
    """
    size = path.stat().st_size
    if not 0 <= offset <= size:
        raise BadChunk(f"offset {offset} lies outside the file of {size} bytes")
    if offset == size:
        return
    start, loop = offset, asyncio.get_running_loop()
    with path.open("rb", buffering=0) as file:

        def read_ahead(begin: int, upload: str) -> asyncio.Future[list[tuple[int, bytes]]]:
            chunk_bytes = min(most_bytes, _chunk_bytes(begin - start if start else None))
            places = range(begin, min(size, begin + ahead_chunks * chunk_bytes), chunk_bytes)
            return loop.run_in_executor(None, _read_messages, file.fileno(), places, size, upload)

        ahead = read_ahead(offset, upload)
        try:
            while offset < size:
                messages = await ahead
                offset = messages[-1][0]
                if offset < size:
                    ahead = read_ahead(offset, "")
                for message in messages:
                    yield message
        finally:
            await asyncio.wait([ahead])  # the file must not be closed under it


def _chunk_bytes(since_break: int | None) -> int:
    """Size of the next chunks: after a break a small share of what has passed since, up to what is cheapest.

    A chunk that is cut in half is lost: so a line that breaks often loses no more than that share.
    """
    if since_break is None:
        return CHUNK_BYTES
    return min(CHUNK_BYTES, max(SMALLEST_CHUNK_BYTES, since_break // BREAK_SHARE))


def _read_messages(descriptor: int, places: range, size: int, upload: str) -> list[tuple[int, bytes]]:
    messages: list[tuple[int, bytes]] = []
    for begin in places:
        payload = os.pread(descriptor, min(places.step, size - begin), begin)
        if not payload:
            raise BadChunk(f"the file was cut at byte {begin} while it was read")
        messages.append((begin + len(payload), Chunk.of(payload, begin, upload).encode()))
        upload = ""
    return messages


async def download(
    stub: TransferStub,
    digest: str,
    size_bytes: int,
    path: Path,
    on_bytes: OnBytes | None = None,
    pace: Pace | None = None,
) -> None:
    """Fetch a file by digest; it takes its name when it is whole and checked.

    A broken stream goes on from the last byte held, and what an earlier call left is taken up.
    ``on_bytes`` hears how many bytes are there.

    Raises:
        Unreachable: no new byte for STALL_S.
        NotFound: the peer has no such file.
        BadChunk: the bytes are not those of the digest.
    """
    partial = PartialFile(path.with_name(f".{path.name}.partial"), size_bytes, digest)
    try:
        await _fetch(stub, partial, on_bytes or (lambda _: None), pace or Pace(None))
        await partial.finish()
        partial.path.replace(path)
    finally:
        await partial.close()


async def _fetch(stub: TransferStub, partial: PartialFile, on_bytes: OnBytes, pace: Pace) -> None:
    pause_s, held, clock = RETRY_S[0], partial.offset, asyncio.get_running_loop().time
    alive_at = clock()
    while partial.offset < partial.size_bytes:
        try:
            with federation_errors("the coordinator"):
                async with asyncio.timeout(STALL_S) as patience:
                    async for message in stub.read(ReadRequest(digest=partial.digest, offset=partial.offset)):
                        chunk = Chunk.decode(message)
                        await partial.add(chunk)
                        on_bytes(partial.offset)
                        await pace.take(len(chunk.payload))
                        patience.reschedule(clock() + STALL_S)
        except TimeoutError:
            raise Unreachable(f"the coordinator has sent no byte for {STALL_S:g} s") from None
        except Unreachable:
            if partial.offset > held:
                pause_s, held, alive_at = RETRY_S[0], partial.offset, clock()
            if clock() - alive_at > STALL_S:
                raise
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 (jitter, not a secret)
            pause_s = min(pause_s * 2, RETRY_S[1])
        else:
            if partial.offset < partial.size_bytes:
                raise BadChunk(
                    f"the peer sent {partial.offset} of {partial.size_bytes} bytes of {partial.digest}"
                )


async def upload(
    stub: TransferStub,
    name: str,
    path: Path,
    offset: int,
    on_bytes: OnBytes | None = None,
    pace: Pace | None = None,
) -> Receipt:
    """Send a file from ``offset`` as the upload of a name, in one attempt; after Unreachable ask QueryWrite
    from where to go on.

    Raises:
        FederationError: whatever the receiver found wrong, or Unreachable.
        OSError: the file cannot be read.
    """
    pace, on_bytes = pace or Pace(None), on_bytes or (lambda _: None)
    found_here: list[Exception] = []  # gRPC turns it into a mere cancellation

    async def messages() -> AsyncIterator[bytes]:
        try:
            if offset == path.stat().st_size:  # all is there already: an empty chunk asks for the receipt
                yield Chunk.of(b"", offset, name).encode()
            begin = offset
            # Both ends take an upload for dead that sends no chunk for long, however slow its site wants it.
            most_bytes = int(min(CHUNK_BYTES, pace.burst_bytes))
            async for end, message in messages_of(path, offset, name, most_bytes=most_bytes):
                await pace.take(end - begin)
                patience.reschedule(clock() + STALL_S)
                yield message
                on_bytes(begin := end)
        except (OSError, BadChunk) as error:
            found_here.append(error)
            raise

    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(STALL_S) as patience:
            with federation_errors("the coordinator"):
                receipt: Receipt = await stub.write(messages())
                return receipt
    except TimeoutError:
        raise Unreachable(f"the coordinator has taken no byte for {STALL_S:g} s") from None
    except (FederationError, asyncio.CancelledError):
        task = asyncio.current_task()
        if found_here and task is not None and not task.cancelling():
            raise found_here[0] from None
        raise
