"""A small fake coordinator on loopback, behind real gRPC, and the console's commands run against it."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import typer
from blake3 import blake3
from crc32c import crc32c as crc32c_of
from google.protobuf.message import Message
from typer.testing import CliRunner, Result

from fedloom.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    runs_pb2_grpc,
    sites_pb2,
    sites_pb2_grpc,
    transfer_pb2,
    transfer_pb2_grpc,
)
from fedloom.v1 import runs_pb2 as pb
from fedloom.v1.session_pb2 import Blob
from fedloom_common.errors import FederationError
from fedloom_common.rpc import status_of
from fedloom_server.console import audit, runs, sites

CHUNK = 1000


@dataclass
class Break:
    """Ends a stream with a status instead of a message."""

    code: grpc.StatusCode
    text: str


class FakeSiteService(sites_pb2_grpc.SiteServiceServicer):
    """Answers every call about a site with the first site that a test put into the coordinator."""

    def __init__(self, coordinator: "FakeCoordinator") -> None:
        self._coordinator = coordinator

    def Get(self, request: Message, context: grpc.ServicerContext) -> pb.Site:
        return self._coordinator._answer(request, context, self._coordinator.sites[0])

    Drain = Undrain = Block = Unblock = Label = Get

    def Forget(
        self, request: sites_pb2.ForgetSiteRequest, context: grpc.ServicerContext
    ) -> sites_pb2.ForgetSiteResponse:
        return self._coordinator._answer(request, context, sites_pb2.ForgetSiteResponse())


class FakeCoordinator(runs_pb2_grpc.RunServiceServicer, transfer_pb2_grpc.TransferServiceServicer):
    """Answers with what a test put into it, and records what it was asked."""

    def __init__(self) -> None:
        self.address = ""
        self.asked: list[object] = []
        self.refusal: FederationError | Break | None = None
        self.run = pb.Run(id="a1b2c3", name="plays", state=pb.RUN_STATE_QUEUED, rounds_total=3)
        self.rounds: list[pb.Round] = []
        self.sites: list[pb.Site] = []
        self.failures: list[pb.RunFailure] = []
        self.connections: list[list[pb.WatchEvent | Break]] = []
        """What each Watch call streams, in order; then it ends."""
        self.hang = False
        """Whether Watch stays open after its last event, until the caller leaves."""
        self.content: dict[str, bytes] = {}
        self.files: list[Blob] = []
        self.folds: list[Blob] = []
        self.audit: list[audit_pb2.AuditEntry] = []
        self.break_reads_at: list[int] = []
        """Each breaks one Read at that byte of the file."""

    def breaks(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE, text: str = "reset") -> Break:
        """An event that ends its stream, or a refusal of the next calls."""
        return Break(code, text)

    def put(self, name: str, content: bytes) -> None:
        """Add a file to what Export names."""
        digest = f"blake3:{blake3(content).hexdigest()}"
        self.content[digest] = content
        self.files.append(Blob(name=name, digest=digest, size_bytes=len(content)))

    def Submit(self, request: pb.SubmitRequest, context: grpc.ServicerContext) -> pb.Run:
        return self._answer(request, context, self.run)

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListResponse:
        return self._answer(request, context, pb.ListResponse(runs=[self.run]))

    def Get(self, request: pb.GetRequest, context: grpc.ServicerContext) -> pb.GetResponse:
        return self._answer(request, context, pb.GetResponse(run=self.run, rounds=self.rounds))

    def Stop(self, request: pb.StopRequest, context: grpc.ServicerContext) -> pb.Run:
        self.run.state, self.run.reason = pb.RUN_STATE_STOPPED, request.reason
        return self._answer(request, context, self.run)

    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.Run:
        self.run.state, self.run.reason = pb.RUN_STATE_QUEUED, ""
        return self._answer(request, context, self.run)

    def Pause(self, request: pb.PauseRequest, context: grpc.ServicerContext) -> pb.Run:
        self.run.state, self.run.reason = pb.RUN_STATE_PAUSED, request.reason
        return self._answer(request, context, self.run)

    def Clone(self, request: pb.CloneRequest, context: grpc.ServicerContext) -> pb.Run:
        return self._answer(request, context, pb.Run(id="c10e", name="plays"))

    def ListFailures(
        self, request: pb.ListFailuresRequest, context: grpc.ServicerContext
    ) -> pb.ListFailuresResponse:
        return self._answer(request, context, pb.ListFailuresResponse(failures=self.failures))

    def ListSites(self, request: pb.ListSitesRequest, context: grpc.ServicerContext) -> pb.ListSitesResponse:
        return self._answer(request, context, pb.ListSitesResponse(sites=self.sites))

    def Export(self, request: pb.ExportRequest, context: grpc.ServicerContext) -> pb.ExportResponse:
        answer = pb.ExportResponse(files=self.files, folds=self.folds, model_card="# plays\n", run=self.run)
        return self._answer(request, context, answer)

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchEvent]:
        self._answer(request, context, None)
        if not self.connections:
            context.abort(grpc.StatusCode.UNAVAILABLE, "no more connections in this test")
        for event in self.connections.pop(0):
            if isinstance(event, Break):
                context.abort(event.code, event.text)
            yield event
        if self.hang:
            left = threading.Event()
            context.add_callback(left.set)
            left.wait(30)

    def Read(
        self, request: transfer_pb2.ReadRequest, context: grpc.ServicerContext
    ) -> Iterator[transfer_pb2.Chunk]:
        self._answer(request, context, None)
        content = self.content[request.digest]
        stop = self.break_reads_at.pop(0) if self.break_reads_at else None
        for offset in range(request.offset, len(content), CHUNK):
            if stop is not None and offset >= stop:
                context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
            payload = content[offset : offset + CHUNK]
            yield transfer_pb2.Chunk(offset=offset, crc32c=crc32c_of(payload), payload=payload)

    def asked_for(self, kind: type) -> list:
        """The requests of one kind, in order."""
        return [request for request in self.asked if isinstance(request, kind)]

    def _answer(self, request, context, answer):
        self.asked.append(request)
        if isinstance(self.refusal, Break):
            context.abort(self.refusal.code, self.refusal.text)
        if self.refusal is not None:
            code, text, metadata = status_of(self.refusal)
            context.set_trailing_metadata(metadata)
            context.abort(code, text)
        return answer


class FakeAudit(audit_pb2_grpc.AuditServiceServicer):
    """The fake coordinator's audit log, three entries a page."""

    def __init__(self, fake: FakeCoordinator) -> None:
        self._fake = fake

    def List(
        self, request: audit_pb2.ListAuditRequest, context: grpc.ServicerContext
    ) -> audit_pb2.ListAuditResponse:
        entries = [entry for entry in self._fake.audit if entry.seq > request.after]
        newest = self._fake.audit[-1] if self._fake.audit else audit_pb2.AuditEntry(hash="0" * 64)
        answer = audit_pb2.ListAuditResponse(
            entries=entries[: min(3, request.most)], head_seq=newest.seq, head_hash=newest.hash
        )
        return self._fake._answer(request, context, answer)


@dataclass
class Console:
    """The commands, called as a shell calls them."""

    address: str
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, command: str, *arguments: str, status: int = 0, text: str | None = None) -> Result:
        app: typer.Typer = {"sites": sites.app, "audit": audit.app}.get(command, runs.app)
        where = ("--coordinator", self.address, "--insecure", "alice") if self.address else ()
        options = () if arguments[0] == "schema" else where
        environment = {"FEDLOOM_OPERATOR_CONFIG": None, "COLUMNS": "200", **self.environment}
        result = CliRunner().invoke(app, [*arguments, *options], input=text, env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result


Serve = Callable[..., tuple[FakeCoordinator, str]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts fake coordinators on free loopback ports, behind TLS if credentials are given."""
    servers: list[grpc.Server] = []

    def start(credentials: grpc.ServerCredentials | None = None) -> tuple[FakeCoordinator, str]:
        fake = FakeCoordinator()
        server = grpc.server(ThreadPoolExecutor(8))
        runs_pb2_grpc.add_RunServiceServicer_to_server(fake, server)
        sites_pb2_grpc.add_SiteServiceServicer_to_server(FakeSiteService(fake), server)
        transfer_pb2_grpc.add_TransferServiceServicer_to_server(fake, server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(FakeAudit(fake), server)
        port = (
            server.add_secure_port("127.0.0.1:0", credentials)
            if credentials
            else server.add_insecure_port("127.0.0.1:0")
        )
        server.start()
        servers.append(server)
        fake.address = f"127.0.0.1:{port}"
        return fake, fake.address

    yield start
    for server in servers:
        server.stop(grace=None).wait()


@pytest.fixture
def fake(serve: Serve) -> FakeCoordinator:
    """A fake coordinator that listens."""
    return serve()[0]


@pytest.fixture
def console(fake: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Console:
    """The commands against the fake coordinator, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Console(fake.address)
