"""Everybody who should not, trying everything over real mTLS: refused, recorded, and none the wiser."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.numpy import save_file

from fedloom.v1 import audit_pb2, runs_pb2, session_pb2, transfer_pb2
from fedloom.v1.audit_pb2_grpc import AuditServiceStub
from fedloom.v1.runs_pb2_grpc import RunServiceStub
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom_common.authority import Authority
from fedloom_common.channels import CHANNEL_OPTIONS, open_channel
from fedloom_common.chunks import Chunk
from fedloom_common.identity import Role, TlsFiles
from fedloom_common.transfer import TransferStub
from fedloom_server.app import Coordinator, coordinator
from fedloom_server.config import CoordinatorConfig, CoordinatorTls
from fedloom_server.records import Assignment
from fedloom_server.rpc.access import TABLE

DENIED, UNREACHED = (
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAVAILABLE,  # the handshake fails, which a client is told no more of
)


class Place:
    """A coordinator with a run on which site ward-a works, and the certificates of everybody."""

    def __init__(self, running: Coordinator, folder: Path, authority: Authority, foreign: Authority) -> None:
        self.running = running
        self._folder = folder
        self._authority = authority
        self._foreign = foreign
        self.assignment: session_pb2.Assignment
        self.granted = asyncio.Event()

    def tls(self, who: str) -> TlsFiles:
        """Certificate files of "site ward-a", or of "foreign operator ann"."""
        folder = self._folder / who.replace(" ", "-")
        if not folder.exists():
            *origin, role, name = who.split()
            credential = (self._foreign if origin else self._authority).issue(Role(role), name)
            folder.mkdir(parents=True)
            (folder / "ca.crt").write_bytes(self._authority.certificate)
            credential.save(folder / "own.crt", folder / "own.key")
        return TlsFiles(ca=folder / "ca.crt", certificate=folder / "own.crt", key=folder / "own.key")

    def channel(self, who: str) -> grpc.aio.Channel:
        address = f"localhost:{self.running.port}"
        ca = self._authority.certificate
        if who == "no certificate":
            credentials = grpc.ssl_channel_credentials(ca)
        elif who.startswith("foreign"):
            tls = self.tls(who)
            credentials = grpc.ssl_channel_credentials(ca, tls.key.read_bytes(), tls.certificate.read_bytes())
        else:
            return open_channel(address, self.tls(who), None)
        return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)

    def actions(self) -> list[tuple[str, str, str, dict[str, Any]]]:
        self.running.store.audit_log.settle(at_end=True)
        entries = self.running.store.audit_log.entries()
        return [(e.actor, e.action, e.subject, json.loads(e.details)) for e in entries]


@pytest.fixture
async def place(tmp_path: Path, spec: Any, initial: Any) -> AsyncIterator[Place]:
    authority = Authority.create(tmp_path / "ca", "fed.test")
    foreign = Authority.create(tmp_path / "foreign-ca", "fed.test")
    certificate = authority.issue(Role.COORDINATOR, "coordinator")
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    certificate.save(tmp_path / "own.crt", tmp_path / "own.key")
    tls = CoordinatorTls(ca=tmp_path / "ca.crt", certificate=tmp_path / "own.crt", key=tmp_path / "own.key")
    config = CoordinatorConfig(
        listen="127.0.0.1:0",
        tls=tls,
        state_dir=tmp_path / "state",
        drain_s=0.2,
    )
    async with coordinator(config) as running:
        place = Place(running, tmp_path / "peers", authority, foreign)
        working = asyncio.create_task(_work(place))
        model = tmp_path / "model"
        model.mkdir()
        save_file(initial, model / "model.safetensors", metadata={"format": "pt"})
        (model / "config.json").write_text('{"model_type": "gpt2"}')
        await running.runs.submissions.enqueue(spec(evaluation={"initial": False}), model)
        await asyncio.wait_for(place.granted.wait(), 60)
        yield place
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def _work(place: Place) -> None:
    """What site ward-a does: it takes the assignment, gets leave to upload, and stays."""
    outgoing: asyncio.Queue[session_pb2.SiteMessage] = asyncio.Queue()

    async def messages() -> AsyncIterator[session_pb2.SiteMessage]:
        while True:
            yield await outgoing.get()

    hello = session_pb2.Hello(
        protocol_version=1, data_sets=[session_pb2.DataSet(name="text", size_bytes=1_000_000)]
    )
    outgoing.put_nowait(session_pb2.SiteMessage(hello=hello))
    async with place.channel("site ward-a") as channel:
        async for message in FederationServiceStub(channel).Attach(messages()):
            match message.WhichOneof("kind"):
                case "assignment":
                    place.assignment = message.assignment
                    outcome = session_pb2.Outcome(
                        assignment_id=message.assignment.id, update_digest="blake3:" + "1" * 64,
                        update_bytes=message.assignment.model.size_bytes, examples=10, tokens=10,
                    )  # fmt: skip
                    outgoing.put_nowait(session_pb2.SiteMessage(outcome=outcome))
                case "upload_grant":
                    place.granted.set()


Call = Callable[[grpc.aio.Channel, Place], Awaitable[object]]


async def _all(stream: Any) -> list[Any]:
    return [message async for message in stream]


def read(digest: Callable[[Place], str]) -> Call:
    return lambda channel, place: _all(
        TransferStub(channel).read(transfer_pb2.ReadRequest(digest=digest(place)))
    )


def write(upload: Callable[[Place], str]) -> Call:
    async def call(channel: grpc.aio.Channel, place: Place) -> object:
        async def chunks() -> AsyncIterator[bytes]:
            yield Chunk.of(b"y" * 50, 0, upload(place)).encode()

        return await TransferStub(channel).write(chunks())

    return call


def query(upload: Callable[[Place], str]) -> Call:
    return lambda channel, place: TransferStub(channel).query_write(
        transfer_pb2.QueryWriteRequest(upload=upload(place))
    )


def operate(method: str, **fields: object) -> Call:
    def call(channel: grpc.aio.Channel, place: Place) -> Any:
        request = getattr(runs_pb2, f"{method}Request")(**fields)
        answer = getattr(RunServiceStub(channel), method)(request)
        return _all(answer) if method == "Watch" else answer

    return call


def attach(channel: grpc.aio.Channel, place: Place) -> Awaitable[object]:
    return _all(FederationServiceStub(channel).Attach(_saying_nothing()))


def begin_to_write(channel: grpc.aio.Channel, place: Place) -> Awaitable[object]:
    return TransferStub(channel).write(_saying_nothing())


async def _saying_nothing() -> AsyncIterator[Any]:
    """Roles are refused before a word is said; gRPC would lose the reason if one was on its way."""
    await asyncio.Event().wait()
    yield


def audit(channel: grpc.aio.Channel, place: Place) -> Any:
    return AuditServiceStub(channel).List(audit_pb2.ListAuditRequest())


def theirs(place: Place) -> str:
    return place.assignment.id


def made_up(place: Place) -> str:
    return "0123456789ab.1.1.train.ward-a"


def model(place: Place) -> str:
    return place.assignment.model.digest


def asset(place: Place) -> str:
    return place.assignment.assets[0].digest


def guessed(place: Place) -> str:
    return "blake3:" + "0" * 64


@dataclass(frozen=True)
class Try:
    who: str
    call: Call
    code: grpc.StatusCode


OPERATORS_CALLS = {
    "Submit": {"spec": "name: x"}, "Stop": {"run_id": ""}, "Resume": {"run_id": ""}, "List": {}, "Get": {},
    "Watch": {}, "Export": {}, "ListSites": {},
}  # fmt: skip

TRIES = {
    **{
        f"{who} calls {name}": Try(who, call, UNREACHED)
        for who in ("no certificate", "foreign site ward-a", "foreign operator ann")
        for name, call in {
            "Attach": attach, "Read": read(model), "Write": write(theirs), "QueryWrite": query(theirs),
            "Submit": operate("Submit", spec="name: x"), "List": operate("List"), "audit": audit,
        }.items()
    },
    **{
        f"a site calls {method}": Try("site ward-b", operate(method, **fields), DENIED)
        for method, fields in OPERATORS_CALLS.items()
    },
    "a site reads the audit log": Try("site ward-b", audit, DENIED),
    "a viewer submits": Try("viewer bob", operate("Submit", spec="name: x"), DENIED),
    "a viewer stops": Try("viewer bob", operate("Stop", run_id="x"), DENIED),
    "a viewer resumes": Try("viewer bob", operate("Resume", run_id="x"), DENIED),
    "an operator attaches": Try("operator ann", attach, DENIED),
    "an operator writes": Try("operator ann", begin_to_write, DENIED),
    "an operator asks for an upload": Try("operator ann", query(theirs), DENIED),
    "the coordinator's role submits": Try("coordinator imposter", operate("Submit", spec="x"), DENIED),
    "the coordinator's role reads": Try("coordinator imposter", read(model), DENIED),
    "a site reads another's model": Try("site ward-b", read(model), DENIED),
    "a site reads another's asset": Try("site ward-b", read(asset), DENIED),
    "a site reads a guessed digest": Try("site ward-b", read(guessed), DENIED),
    "a site reads a path": Try("site ward-b", read(lambda place: "../coordinator.db"), DENIED),
    "a site reads another's update by name": Try("site ward-b", read(theirs), DENIED),
    "a site writes another's update": Try("site ward-b", write(theirs), DENIED),
    "a site writes an update that is none": Try("site ward-b", write(made_up), DENIED),
    "a site writes to a path": Try("site ward-b", write(lambda place: "../../files/x"), DENIED),
    "a site asks for another's update": Try("site ward-b", query(theirs), DENIED),
    "a site asks for an update that is none": Try("site ward-b", query(made_up), DENIED),
    "a site asks for a path": Try("site ward-b", query(lambda place: "/etc/passwd"), DENIED),
}  # fmt: skip


async def test_every_intruder_is_refused_and_recorded(place: Place) -> None:
    texts: dict[str, str] = {}
    for name, attempt in TRIES.items():
        async with place.channel(attempt.who) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(attempt.call(channel, place), 60)
        assert caught.value.code() is attempt.code, (name, caught.value.details())
        texts[name] = caught.value.details() or ""
    _nothing_is_told(place, texts)
    actions = place.actions()
    for who in {attempt.who for attempt in TRIES.values() if attempt.code is DENIED}:
        refused = [told for actor, action, _, told in actions if (actor, action) == (who, "call.refused")]
        counted = sum(details.get("more_of_the_same", 1) for details in refused)
        assert counted == sum(a.who == who and a.code is DENIED for a in TRIES.values()), who
    assert not [entry for entry in actions if entry[1] in ("run.submit", "run.stop", "run.resume")]
    held = place.running.store.assignment(theirs(place))
    assert isinstance(held, Assignment)
    assert held.state == "open"
    assert held.update_digest == "blake3:" + "1" * 64


def _nothing_is_told(place: Place, texts: dict[str, str]) -> None:
    """The words are the same for what exists and for what does not, but for what the intruder itself said."""

    def without(name: str, said: str) -> str:
        return texts[name].replace(said, "…")

    assert (
        without("a site reads another's model", model(place))
        == without("a site reads another's asset", asset(place))
        == without("a site reads a guessed digest", guessed(place))
        == without("a site reads a path", "../coordinator.db")
    )
    for verb in ("writes", "asks for"):
        assert without(f"a site {verb} another's update", theirs(place)) == without(
            f"a site {verb} an update that is none", made_up(place)
        )


async def test_what_its_assignment_names_a_site_may_read(place: Place) -> None:
    async with place.channel("site ward-a") as channel:
        for digest in (model(place), asset(place)):
            chunks = await read(lambda _, digest=digest: digest)(channel, place)
            assert chunks
        with pytest.raises(grpc.aio.AioRpcError, match="no assignment of this site names"):
            await read(guessed)(channel, place)


@pytest.mark.parametrize("kind", ["outcome", "refusal", "failure", "progress"])
async def test_a_site_cannot_speak_for_another(place: Place, kind: str) -> None:
    types = {
        "outcome": session_pb2.Outcome, "refusal": session_pb2.Refusal, "failure": session_pb2.Failure,
        "progress": session_pb2.Progress,
    }  # fmt: skip
    told = session_pb2.SiteMessage(**{kind: types[kind](assignment_id=theirs(place))})
    hello = session_pb2.SiteMessage(hello=session_pb2.Hello(protocol_version=1))
    async with place.channel("site ward-b") as channel:
        call = FederationServiceStub(channel).Attach(_and_stay(hello, told))
        await asyncio.wait_for(call.read(), 60)
        deadline_s = time.monotonic() + 60
        while not (found := [a for a in place.actions() if a[1] == "message.refused"]):
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)
        call.cancel()
    assert found[0][0] == "site ward-b"
    assert found[0][2:] == (theirs(place), {"kind": kind})
    held = place.running.store.assignment(theirs(place))
    assert held is not None
    assert held.state == "open"


async def _and_stay(*messages: session_pb2.SiteMessage) -> AsyncIterator[session_pb2.SiteMessage]:
    for message in messages:
        yield message
    await asyncio.sleep(600)


async def test_what_operators_do_is_recorded_before_it_is_done(place: Place) -> None:
    run = place.assignment.run_id
    async with place.channel("operator ann") as channel, place.channel("viewer bob") as other:
        await RunServiceStub(other).Export(runs_pb2.ExportRequest(run_id=run))
        await RunServiceStub(channel).Stop(runs_pb2.StopRequest(run_id=run, reason="enough"))
        with pytest.raises(grpc.aio.AioRpcError, match="mistakes"):
            await RunServiceStub(channel).Submit(runs_pb2.SubmitRequest(spec="name: x"))
    began = ("run.queued", "run.waiting", "run.running")
    told = [a[:3] for a in place.actions() if a[0] != "site ward-a" and a[1] not in began]
    assert told == [
        ("viewer bob", "model.export", run),
        ("operator ann", "run.stop", run),
        ("coordinator", "run.stopped", run),
        ("operator ann", "run.submit", ""),
        ("operator ann", "run.submit.failed", "/fedloom.v1.RunService/Submit"),
    ]


@pytest.mark.parametrize("role", list(Role))
async def test_no_role_calls_a_method_that_the_table_does_not_admit_it_to(place: Place, role: Role) -> None:
    async with place.channel(f"{role} somebody") as channel:
        for method, rule in TABLE.items():
            call = channel.unary_stream(method)(b"\xff")  # no message: who is refused is refused before that
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(_all(call), 60)
            code, text = caught.value.code(), caught.value.details() or ""
            if code is grpc.StatusCode.UNIMPLEMENTED:
                assert method == "/grpc.health.v1.Health/List"  # of later releases of gRPC
            elif role in rule.roles:
                assert "not of the contract" in text, method
            else:
                assert code is DENIED, method
                assert text.startswith(f"{role} somebody may not call {method}, which is for "), method
                assert role not in text.rpartition(" is for ")[2], method
