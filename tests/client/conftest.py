"""A coordinator that speaks the protocol on loopback, and a worker group that trains nothing."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from blake3 import blake3
from crc32c import crc32c as crc32c_of

from fedloom.v1 import session_pb2 as pb
from fedloom.v1 import transfer_pb2
from fedloom.v1.session_pb2_grpc import FederationServiceServicer, add_FederationServiceServicer_to_server
from fedloom.v1.transfer_pb2_grpc import TransferServiceServicer, add_TransferServiceServicer_to_server
from fedloom_client.config import DataSource, SiteConfig
from fedloom_client.daemon import Daemon
from fedloom_client.training.orders import Order, WorkerProgress, WorkerResult
from fedloom_common.errors import FederationError
from fedloom_common.rpc import status_of

CHUNK_BYTES = 1 << 16
WAIT_S = 60.0  # a machine may stand still for seconds


def digest_of(content: bytes) -> str:
    return f"blake3:{blake3(content).hexdigest()}"


class FakeCoordinator(FederationServiceServicer, TransferServiceServicer):
    """Does what the header of session.proto says, and the faults that a test asks for."""

    def __init__(self) -> None:
        self.port = 0
        self.heartbeat_s = 0.2
        self.protocol_version = 1
        self.attach_error: tuple[grpc.StatusCode, str] | None = None
        self.is_silent = False
        self.read_errors: list[FederationError] = []
        self.write_errors: list[tuple[grpc.StatusCode, str]] = []
        self.cut_after_bytes: int | None = None
        self.grants = True
        self.hellos: list[pb.Hello] = []
        self.heard: list[pb.SiteMessage] = []
        self.files: dict[str, bytes] = {}
        self.reads: list[tuple[str, int]] = []
        self.open: dict[str, pb.Assignment] = {}
        self.spool: dict[str, bytearray] = {}
        self.write_offsets: list[int] = []
        self.receipts: list[str] = []
        self._changed = asyncio.Condition()
        self._outbox: asyncio.Queue[pb.CoordinatorMessage | None] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_FederationServiceServicer_to_server(self, self._server)
        add_TransferServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def add_file(self, name: str, content: bytes) -> pb.Blob:
        self.files[digest_of(content)] = content
        return pb.Blob(name=name, digest=digest_of(content), size_bytes=len(content))

    def send(self, **kind: Any) -> None:
        self._outbox.put_nowait(pb.CoordinatorMessage(**kind))

    def assign(self, assignment: pb.Assignment) -> None:
        self.open[assignment.id] = assignment
        self.send(assignment=assignment)

    def break_session(self) -> None:
        self._outbox.put_nowait(None)

    def kinds(self, kind: str) -> list[Any]:
        return [getattr(message, kind) for message in self.heard if message.WhichOneof("kind") == kind]

    async def until(self, condition: Callable[[], Any]) -> Any:
        """What the condition gives as soon as it is true."""
        async with asyncio.timeout(WAIT_S), self._changed:
            while not (value := condition()):
                await self._changed.wait()
        return value

    async def until_heard(self, kind: str, count: int = 1) -> Any:
        return (await self.until(lambda: len(heard := self.kinds(kind)) >= count and heard))[count - 1]

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def Attach(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.CoordinatorMessage]:
        if self.attach_error is not None:
            await context.abort(*self.attach_error)
        self.hellos.append((await anext(request_iterator)).hello)
        self._outbox = asyncio.Queue()
        reading = asyncio.create_task(self._read(request_iterator))
        await self._tell()
        try:
            if self.is_silent:
                await asyncio.Event().wait()
            welcome = pb.Welcome(
                protocol_version=self.protocol_version, site="oslo", heartbeat_s=self.heartbeat_s
            )
            yield pb.CoordinatorMessage(welcome=welcome)
            for assignment in list(self.open.values()):
                yield pb.CoordinatorMessage(assignment=assignment)
            while (message := await self._outbox.get()) is not None:
                yield message
        finally:
            reading.cancel()

    async def _read(self, messages: Any) -> None:
        async for message in messages:
            self.heard.append(message)
            kind = message.WhichOneof("kind")
            if kind == "outcome" and message.outcome.update_digest:
                if self.grants:
                    self.grant(message.outcome.assignment_id)
            elif kind in ("outcome", "refusal", "failure"):
                self.open.pop(getattr(message, kind).assignment_id, None)
            await self._tell()

    def grant(self, name: str) -> None:
        held = self.spool.setdefault(name, bytearray())
        self.send(upload_grant=pb.UploadGrant(assignment_id=name, upload=f"up-{name}", offset=len(held)))

    async def Read(self, request: Any, context: Any) -> AsyncIterator[transfer_pb2.Chunk]:
        self.reads.append((request.digest, request.offset))
        if self.read_errors:
            await context.abort(*status_of(self.read_errors.pop()))
        content = self.files.get(request.digest)
        if content is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no file {request.digest}")
        for offset in range(request.offset, len(content), CHUNK_BYTES):
            payload = content[offset : offset + CHUNK_BYTES]
            yield transfer_pb2.Chunk(offset=offset, crc32c=crc32c_of(payload), payload=payload)

    async def Write(self, request_iterator: Any, context: Any) -> transfer_pb2.Receipt:
        name = ""
        try:
            async for chunk in request_iterator:
                if self.write_errors:
                    await context.abort(*self.write_errors.pop(0))
                if not name:
                    name = chunk.upload.removeprefix("up-")
                    self.write_offsets.append(chunk.offset)
                assert chunk.offset == len(self.spool[name])
                self.spool[name] += chunk.payload
                if self.cut_after_bytes is not None and len(self.spool[name]) >= self.cut_after_bytes:
                    self.cut_after_bytes = None
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the test")
            self.open.pop(name, None)
            self.receipts.append(name)
            content = bytes(self.spool[name])
            return transfer_pb2.Receipt(
                upload=f"up-{name}", digest=digest_of(content), size_bytes=len(content)
            )
        finally:
            await self._tell()

    async def QueryWrite(self, request: Any, context: Any) -> transfer_pb2.QueryWriteResponse:
        name = request.upload.removeprefix("up-")
        return transfer_pb2.QueryWriteResponse(
            committed_bytes=len(self.spool[name]), complete=name in self.receipts
        )


@dataclass
class FakeGroup:
    """Writes ``update`` as the trained tensors, as soon as ``gate`` is open."""

    update: bytes = b"trained"
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    before: WorkerResult | None = None
    orders: list[Order] = field(default_factory=list)
    models: list[bytes] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: int = 0
    stopped: int = 0
    report: Callable[[WorkerProgress], None] = lambda progress: None

    def __post_init__(self) -> None:
        self.gate.set()

    def make(self, data_set: str, folder: Path) -> "FakeGroup":
        self.folders.append(folder)
        return self

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult:
        self.orders.append(order)
        self.models.append(Path(order.model_path).read_bytes())
        self.report = on_progress
        self.started.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        on_progress(WorkerProgress(phase="train", done=3, total=3, loss=1.5, tokens_per_s=100.0))
        if order.work == "train":
            Path(order.update_path).write_bytes(self.update)
        return WorkerResult(
            examples=12, tokens=480, metrics={"loss": 1.5}, phase_seconds={"train": 0.25}, update_path=None,
            before=self.before, data_examples=99,
        )  # fmt: skip

    async def stop(self) -> None:
        self.stopped += 1


SPEC = {
    "name": "tiny",
    "model": {"config": {"model_type": "gpt2"}},
    "data": "plays",
    "rounds": 3,
    "local": {"steps": 5},
}


class World:
    """A coordinator, a site's config, and daemons of that site."""

    def __init__(self, folder: Path) -> None:
        self.coordinator = FakeCoordinator()
        self.group = FakeGroup()
        self.folder = folder
        self.state = folder / "state"
        (folder / "a.txt").write_text("to be or not to be")
        self.model = self.coordinator.add_file("model.safetensors", b"theta" * 1000)
        self.config_file = self.coordinator.add_file("config.json", b'{"model_type": "gpt2"}')
        self._tasks: list[asyncio.Task[None]] = []

    def config(self, **changes: Any) -> SiteConfig:
        facts: dict[str, Any] = {
            "coordinator": f"127.0.0.1:{self.coordinator.port}",
            "insecure": "oslo",
            "state_dir": self.state,
            "data": {"plays": DataSource(files=(str(self.folder / "*.txt"),))},
            "workers": {"device": "cpu"},
        }
        return SiteConfig.model_validate(facts | changes)

    def daemon(self, **changes: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(Daemon(self.config(**changes), make_group=self.group.make).run())
        self._tasks.append(task)
        return task

    async def attached(self, count: int = 1) -> pb.Hello:
        hellos = self.coordinator.hellos
        return await self.coordinator.until(lambda: len(hellos) >= count and hellos[count - 1])

    def assignment(self, name: str = "r1-train", **changes: Any) -> pb.Assignment:
        facts: dict[str, Any] = {
            "id": name,
            "work": pb.WORK_TRAIN,
            "run_id": "run-1",
            "round": 1,
            "attempt": 1,
            "model": self.model,
            "assets": [self.config_file],
            "spec_json": self.spec_json(),
        }
        return pb.Assignment(**facts | changes)

    def spec_json(self, **changes: Any) -> str:
        return json.dumps(SPEC | changes)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for what the coordinator does not hear of."""
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110 (any condition at all)
                await asyncio.sleep(0.02)

    async def stop(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def close(self) -> None:
        for task in self._tasks:
            await self.stop(task)
        await self.coordinator.stop()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A running coordinator and a site that has not started yet."""
    world = World(tmp_path)
    await world.coordinator.start()
    yield world
    await world.close()
