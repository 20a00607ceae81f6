"""The gRPC edge of transfers: models out, updates in, each update checked before it counts."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from fedloom.v1 import transfer_pb2 as pb
from fedloom.v1.transfer_pb2_grpc import TransferServiceServicer
from fedloom_common.errors import AttemptFailed, BadChunk, BadTensor, ProtocolError, WrongState
from fedloom_common.identity import Role
from fedloom_common.tensors import Manifest
from fedloom_common.transfer import PartialFile, chunks_of
from fedloom_server.aggregation.validation import validate_update
from fedloom_server.assignments import Assignments
from fedloom_server.records import Assignment, AssignmentState
from fedloom_server.rpc.access import Access
from fedloom_server.store import Store

CHUNK_S = 600.0  # a transfer that moves no chunk for so long is ended; 1 MiB takes that at 14 kbit/s

Context = grpc.aio.ServicerContext[Any, Any]


class TransferEdge(TransferServiceServicer):
    """Read, Write and QueryWrite."""

    def __init__(self, access: Access, store: Store, assignments: Assignments) -> None:
        self._access = access
        self._store = store
        self._assignments = assignments
        # Who writes each upload: a new stream takes over from one that broke.
        self._writers: dict[str, object] = {}

    async def Read(self, request: pb.ReadRequest, context: Context) -> None:  # noqa: N802
        """Stream a model or asset from an offset."""
        peer = self._access.peer(context)
        async for chunk in chunks_of(self._store.files.path(request.digest), request.offset):
            try:
                await asyncio.wait_for(context.write(chunk), CHUNK_S)
            except TimeoutError:
                raise BadChunk(f"no chunk was taken in {CHUNK_S:g} s") from None
            if peer.role is Role.SITE:
                self._assignments.moved(peer.name, down_bytes=len(chunk.payload))

    async def QueryWrite(self, request: pb.QueryWriteRequest, context: Context) -> pb.QueryWriteResponse:  # noqa: N802
        """Tell how much of an upload is held."""
        assignment = self._assignments.uploading(self._access.peer(context).name, request.upload)
        if assignment.state is AssignmentState.DONE:
            return pb.QueryWriteResponse(committed_bytes=assignment.update_bytes, complete=True)
        return pb.QueryWriteResponse(committed_bytes=self._assignments.held_bytes(assignment))

    async def Write(self, request_iterator: AsyncIterator[pb.Chunk], context: Context) -> pb.Receipt:  # noqa: N802
        """Take an update in; a repeated one is answered with its receipt again."""
        first = await _next_chunk(request_iterator)
        if first is None or not first.upload:
            raise ProtocolError("the first chunk of a Write names its upload; this one does not")
        assignment = self._assignments.uploading(self._access.peer(context).name, first.upload)
        if assignment.state is not AssignmentState.DONE:
            digest = assignment.update_digest
            try:
                await self._receive(assignment, first, request_iterator)
            except AttemptFailed as error:
                self._assignments.troubled(assignment, str(error))
                raise
            await self._check(assignment)
            self._assignments.delivered(assignment, digest)
        return pb.Receipt(
            upload=assignment.id, digest=assignment.update_digest, size_bytes=assignment.update_bytes
        )

    async def _receive(self, assignment: Assignment, first: pb.Chunk, rest: AsyncIterator[pb.Chunk]) -> None:
        """Put the update together in the spool."""
        held_bytes = self._assignments.held_bytes(assignment)
        if first.offset != held_bytes:  # before it takes over from a stream that may be going well
            raise BadChunk(f"the upload goes on at byte {held_bytes}, a chunk at byte {first.offset} came")
        mine = self._writers[assignment.id] = object()
        path = self._store.update_path(assignment)
        partial = await PartialFile.open(path, assignment.update_bytes, assignment.update_digest)
        try:
            chunk: pb.Chunk | None = first
            while chunk is not None:
                if self._writers.get(assignment.id) is not mine:
                    raise BadChunk("another stream has taken this upload over")
                self._assignments.uploading(assignment.site, assignment.id)  # still wanted?
                await partial.add(chunk)
                self._assignments.received(assignment, len(chunk.payload))
                chunk = await _next_chunk(rest)
            await partial.finish()
        finally:
            partial.close()
            if self._writers.get(assignment.id) is mine:
                del self._writers[assignment.id]

    async def _check(self, assignment: Assignment) -> None:
        """Check the update against the model."""
        manifest = Manifest.read(self._store.files.path(assignment.model_digest))
        try:
            await asyncio.to_thread(validate_update, self._store.update_path(assignment), manifest)
        except BadTensor as error:
            self._assignments.rejected(assignment, str(error))
            raise BadTensor(f"round {assignment.round}, site {assignment.site}: {error}") from error
        except FileNotFoundError as error:
            raise WrongState(f"upload {assignment.id} came too late: its round has gone on") from error


async def _next_chunk(chunks: AsyncIterator[pb.Chunk]) -> pb.Chunk | None:
    try:
        return await asyncio.wait_for(anext(chunks), CHUNK_S)
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise BadChunk(f"no chunk came in {CHUNK_S:g} s") from None
