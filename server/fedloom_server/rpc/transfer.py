"""The gRPC edge of transfers: models out, updates in, each update checked before it counts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc

from fedloom.v1 import transfer_pb2 as pb
from fedloom_common.chunks import CHUNK_BYTES, Chunk
from fedloom_common.errors import AttemptFailed, BadChunk, BadTensor, NotPermitted, ProtocolError, WrongState
from fedloom_common.identity import Peer, Role
from fedloom_common.partial import PartialFile
from fedloom_common.transfer import STALL_S, messages_of, transfer_handlers
from fedloom_server.aggregation.validation import validate_update
from fedloom_server.assignments import Assignments
from fedloom_server.records import Assignment, AssignmentState
from fedloom_server.rpc.access import Access, Context
from fedloom_server.rpc.calls import READ, Calls
from fedloom_server.store import Store

READS_OF_A_SITE = 2  # it reads one model at a time; a line that broke unseen may hold another
WAIT_S = 5.0  # how often a site that waits for its download is noted as alive
SETTLE_S = 1.0  # a few chunks are written in much less
TAKEN_OVER = "another stream has taken this upload over"
AHEAD_CHUNKS = 2  # for each site that reads: dozens may do so at once


class _Writer:
    """The stream that writes an upload: one at a time, until its update counts or the stream has ended."""

    def __init__(self) -> None:
        self.patience: asyncio.Timeout | None = None
        """While it waits for chunks."""
        self.is_unwanted = False
        """Another stream is to go on with the upload."""
        self.ended = asyncio.Event()

    async def end(self) -> None:
        """Have it wait for no more chunks; returns when what came is on disk, and counts if it was all."""
        if self.patience is not None and not self.is_unwanted:
            self.patience.reschedule(asyncio.get_running_loop().time())
        self.is_unwanted = True
        await self.ended.wait()


class TransferEdge:
    """Read, Write and QueryWrite."""

    def __init__(
        self,
        access: Access,
        calls: Calls,
        store: Store,
        assignments: Assignments,
        *,
        concurrent_downloads: int,
    ) -> None:
        self._access = access
        self._calls = calls
        self._store = store
        self._assignments, self._uploads = assignments, assignments.uploads
        self._downloads = asyncio.Semaphore(concurrent_downloads)
        self._reading: dict[Peer, list[asyncio.Timeout]] = {}
        self._writers: dict[str, _Writer] = {}

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service, for a server."""
        return transfer_handlers(self._read, self._write, self._query_write)

    async def _read(self, request: pb.ReadRequest, context: Context) -> None:
        """Stream a model or asset from an offset."""
        peer = self._access.peer(context)
        if peer.role is Role.SITE and not self._assignments.names(peer.name, request.digest):
            # The same words for what is kept for others and for what is not kept at all.
            raise NotPermitted(f"no assignment of this site names {request.digest[:100]!r}")
        path = await self._store.files.bring(request.digest)
        if path.stat().st_size <= CHUNK_BYTES:
            await self._send(path, request.offset, peer, context)
            return
        try:
            async with self._place_of(peer), self._turn(peer):
                await self._send(path, request.offset, peer, context)
        except TimeoutError:
            raise BadChunk("a newer download of the same site has taken this one's place") from None

    @asynccontextmanager
    async def _place_of(self, peer: Peer) -> AsyncIterator[None]:
        """One of a site's few downloads: a further one ends the oldest, whose line is most likely broken."""
        async with asyncio.timeout(None) as life:
            mine = self._reading.setdefault(peer, [])
            if peer.role is Role.SITE and len(mine) == READS_OF_A_SITE:
                mine.pop(0).reschedule(asyncio.get_running_loop().time())
            mine.append(life)
            try:
                yield
            finally:
                if life in mine:
                    mine.remove(life)
                if not mine:
                    self._reading.pop(peer, None)

    @asynccontextmanager
    async def _turn(self, peer: Peer) -> AsyncIterator[None]:
        """One of a limited number of downloads; a site that waits for it is alive."""
        waiting = asyncio.ensure_future(self._downloads.acquire())
        try:
            with self._calls.waiting_in(READ):
                while not (await asyncio.wait([waiting], timeout=WAIT_S))[0]:
                    self._moved(peer, 0)
            yield
        finally:
            if not waiting.cancel():  # it was done: the turn was had
                self._downloads.release()

    async def _send(self, path: Path, begin: int, peer: Peer, context: Context) -> None:
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(STALL_S) as patience:
                async for end, message in messages_of(path, begin, ahead_chunks=AHEAD_CHUNKS):
                    await context.write(message)
                    patience.reschedule(clock() + STALL_S)
                    self._moved(peer, end - begin)
                    begin = end
        except TimeoutError:
            raise BadChunk(f"no chunk was taken in {STALL_S:g} s") from None

    def _moved(self, peer: Peer, down_bytes: int) -> None:
        if peer.role is Role.SITE:
            self._assignments.moved(peer.name, down_bytes=down_bytes)

    async def _query_write(self, request: pb.QueryWriteRequest, context: Context) -> pb.QueryWriteResponse:
        """Tell how much of an upload is held."""
        assignment = self._uploads.uploading(self._access.peer(context).name, request.upload)
        if (writer := self._writers.get(assignment.id)) is not None:
            with suppress(TimeoutError):  # the site has given it up, even where the line has not told us so
                await asyncio.wait_for(writer.end(), SETTLE_S)
        assignment = self._uploads.uploading(assignment.site, assignment.id)
        if assignment.state is AssignmentState.DONE:
            return pb.QueryWriteResponse(committed_bytes=assignment.update_bytes, complete=True)
        return pb.QueryWriteResponse(committed_bytes=self._uploads.held_bytes(assignment))

    async def _write(self, messages: AsyncIterator[bytes], context: Context) -> pb.Receipt:
        """Take an update in; a repeated one is answered with its receipt again."""
        first = await _first_chunk(messages)
        assignment = self._uploads.uploading(self._access.peer(context).name, first.upload)
        if assignment.state is not AssignmentState.DONE:
            self._require_next(assignment, first)  # before it takes over from a stream that may be going well
            async with self._sole_writer(assignment.id) as writer:
                assignment = self._uploads.uploading(assignment.site, assignment.id)
                if assignment.state is not AssignmentState.DONE:
                    await self._take_in(assignment, first, messages, writer)
        return pb.Receipt(
            upload=assignment.id, digest=assignment.update_digest, size_bytes=assignment.update_bytes
        )

    @asynccontextmanager
    async def _sole_writer(self, upload: str) -> AsyncIterator[_Writer]:
        """Take an upload over once the stream before has let go of its file.

        A file that counts is folded, and then overwritten by other sites' updates: two streams that have it
        open could spoil those.
        """
        while (other := self._writers.get(upload)) is not None:
            await other.end()
        mine = self._writers[upload] = _Writer()
        try:
            yield mine
        finally:
            del self._writers[upload]
            mine.ended.set()

    async def _take_in(
        self, assignment: Assignment, first: Chunk, messages: AsyncIterator[bytes], writer: _Writer
    ) -> None:
        """Receive an update, check it and let it count."""
        digest = assignment.update_digest
        try:
            await self._receive(assignment, first, messages, writer)
        except AttemptFailed as error:
            self._uploads.troubled(assignment, str(error))
            raise
        await self._check(assignment)
        self._uploads.delivered(assignment, digest)

    async def _receive(
        self, assignment: Assignment, first: Chunk, messages: AsyncIterator[bytes], writer: _Writer
    ) -> None:
        """Put the update together in the spool."""
        held_bytes = self._require_next(assignment, first)
        path = self._store.spool.place_for(assignment)
        partial = PartialFile(path, assignment.update_bytes, assignment.update_digest)
        assignment.bytes_up = max(assignment.bytes_up, held_bytes)  # what came before a restart is no news
        try:
            await self._add(partial, assignment, first, writer)
            async with asyncio.timeout(STALL_S) as writer.patience:
                async for message in messages:
                    await self._add(partial, assignment, Chunk.decode(message), writer)
                    writer.patience.reschedule(asyncio.get_running_loop().time() + STALL_S)
            writer.patience = None
            await partial.finish()
        except TimeoutError:
            reason = TAKEN_OVER if writer.is_unwanted else f"no chunk came in {STALL_S:g} s"
            raise BadChunk(reason) from None
        finally:
            writer.patience = None
            await partial.close()

    def _require_next(self, assignment: Assignment, first: Chunk) -> int:
        """Bytes that are held of an upload: there the first chunk of a stream must begin."""
        held_bytes = self._uploads.held_bytes(assignment)
        if first.offset != held_bytes:
            raise BadChunk(f"the upload goes on at byte {held_bytes}, a chunk at byte {first.offset} came")
        return held_bytes

    async def _add(self, partial: PartialFile, assignment: Assignment, chunk: Chunk, writer: _Writer) -> None:
        if writer.is_unwanted:
            raise BadChunk(TAKEN_OVER)
        self._uploads.uploading(assignment.site, assignment.id)  # still wanted?
        await partial.add(chunk)
        self._uploads.received(assignment, len(chunk.payload))

    async def _check(self, assignment: Assignment) -> None:
        """Check the update against the model."""
        path, digest = self._store.spool.update_path(assignment), assignment.model_digest
        up = self._store.run(assignment.run_id).spec.transport.up
        try:
            await asyncio.to_thread(validate_update, path, self._store.files.path(digest), up, digest)
        except BadTensor as error:
            self._uploads.rejected(assignment, str(error))
            raise BadTensor(f"round {assignment.round}, site {assignment.site}: {error}") from error
        except FileNotFoundError as error:
            raise WrongState(f"upload {assignment.id} came too late: its round has gone on") from error


async def _first_chunk(messages: AsyncIterator[bytes]) -> Chunk:
    """The chunk that names the upload.

    Raises:
        ProtocolError: none comes, or it does not.
    """
    try:
        first = Chunk.decode(await asyncio.wait_for(anext(messages), STALL_S))
    except StopAsyncIteration:
        raise ProtocolError("the first chunk of a Write names its upload; no chunk came") from None
    except TimeoutError:
        raise BadChunk(f"no chunk came in {STALL_S:g} s") from None
    if not first.upload:
        raise ProtocolError("the first chunk of a Write names its upload; this one does not")
    return first
