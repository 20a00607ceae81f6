"""A real coordinator on loopback, and sites that speak the protocol but train nothing."""

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from enum import Enum, auto
from pathlib import Path

import grpc
import numpy as np
import postgresql
import pytest
from safetensors.numpy import load_file, save_file

from fedloom.v1 import session_pb2 as pb
from fedloom.v1 import transfer_pb2
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.chunks import Chunk
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import FederationError
from fedloom_common.identity import Peer, Role
from fedloom_common.runspec import RunSpec
from fedloom_common.transfer import TransferStub, download, messages_of, upload
from fedloom_server.app import Coordinator, coordinator
from fedloom_server.config import CoordinatorConfig
from fedloom_server.records import Run


class Fault(Enum):
    """What a site does wrong in its training assignments."""

    NONE = auto()
    REFUSES = auto()
    FAILS = auto()
    SILENT = auto()
    NO_EXAMPLES = auto()
    TOO_MANY_EXAMPLES = auto()
    NAN = auto()
    MISSING_TENSOR = auto()
    SURPLUS_TENSOR = auto()
    WRONG_SHAPE = auto()
    WRONG_DTYPE = auto()
    NOT_SAFETENSORS = auto()
    CORRUPT_CHUNK = auto()
    WRONG_DIGEST = auto()
    TOO_LARGE = auto()
    CUT_ONCE = auto()
    NEVER_UPLOADS = auto()
    NEVER_EVALUATES = auto()
    REPEATS_ITSELF = auto()
    HUGE_NUMBERS = auto()
    ANNOUNCES_ANOTHER = auto()
    TALKS_WITHOUT_END = auto()
    ODD_NAMES = auto()
    NO_DIGEST = auto()
    EVALUATES_THE_WORLD = auto()


Tensors = dict[str, np.ndarray]


class FakeSite:
    """A site whose training adds ``step`` to every value, by the contract alone."""

    def __init__(
        self, port: int, name: str, folder: Path, *, step: float, examples: int, fault: Fault
    ) -> None:
        self.name = name
        self.step = step
        self.examples = examples
        self.fault = fault
        self.gate: asyncio.Semaphore | None = None
        """Lets so many trainings end; all do at once without it."""
        self.seconds = 0.0
        """How long a training takes."""
        self.learn: Callable[[Tensors, int], Tensors] | None = None
        """What the n-th training makes of a model; adds ``step`` if not given."""
        self.measure: Callable[[Tensors], float] | None = None
        """A model's held-out loss."""
        self.folder = folder
        self.trained: list[str] = []
        self.asked: list[pb.Assignment] = []
        self.counted: list[str] = []
        self.downloads = 0
        self.granted = False
        self.repeated = 0
        self.open_assignments: list[str] = []
        self.kept_runs: list[str] = []
        self.labels: dict[str, str] = {}
        self.assigned = asyncio.Event()
        self.cancelled: dict[str, str] = {}
        self.ended_runs: list[str] = []
        self.errors: list[str] = []
        self.receipts: list[transfer_pb2.Receipt] = []
        self._port = port
        self._downloading = asyncio.Lock()
        self._outbox: asyncio.Queue[pb.SiteMessage] = asyncio.Queue()
        self._updates: dict[str, Path] = {}
        self._tasks: list[asyncio.Task[None]] = []
        folder.mkdir(parents=True, exist_ok=True)

    async def attend(self) -> None:
        """One session, until it ends."""
        async with open_channel(f"127.0.0.1:{self._port}", None, Peer(Role.SITE, self.name)) as channel:
            self.transfer = TransferStub(channel)
            hello = pb.Hello(
                protocol_version=1,
                software="fake",
                data_sets=[pb.DataSet(name="text", size_bytes=1_000_000)],
                open_assignments=self.open_assignments,
                kept_runs=self.kept_runs,
                labels=self.labels,
            )
            self._outbox = asyncio.Queue()
            self.send(hello=hello)
            try:
                async for message in FederationServiceStub(channel).Attach(self._messages()):
                    self._take(message)
            except grpc.aio.AioRpcError as error:
                self.errors.append(error.details() or "")
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    def send(self, **kind: object) -> None:
        self._outbox.put_nowait(pb.SiteMessage(**kind))

    async def _messages(self) -> AsyncIterator[pb.SiteMessage]:
        while True:
            yield await self._outbox.get()

    def _take(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("kind"):
            case "assignment":
                self.assigned.set()
                self.asked.append(message.assignment)
                self._spawn(self._do(message.assignment))
            case "upload_grant":
                self._spawn(self._upload(message.upload_grant))
            case "cancel":
                self.cancelled[message.cancel.assignment_id] = message.cancel.reason
                if message.cancel.counts:
                    self.counted.append(message.cancel.assignment_id)
            case "run_ended":
                self.ended_runs.append(message.run_ended.run_id)

    def _spawn(self, work: object) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    async def _do(self, assignment: pb.Assignment) -> None:
        model = self.folder / assignment.model.digest.removeprefix("blake3:")
        async with self._downloading:  # several runs may begin with the same model
            if not model.exists():
                await download(self.transfer, assignment.model.digest, assignment.model.size_bytes, model)
                self.downloads += 1
        if assignment.work == pb.WORK_EVALUATE and self.fault is Fault.NEVER_EVALUATES:
            return
        if assignment.work == pb.WORK_EVALUATE:
            tensors = load_file(model)
            loss = 10.0 - float(np.mean([tensor.mean() for tensor in tensors.values()]))
            if self.measure is not None:
                loss = self.measure(tensors)
            metrics = {"loss": loss, "perplexity": float(np.exp(loss))}
            examples, tokens, seconds = self.examples, 10, {"evaluate": 0.1}
            if self.fault is Fault.ODD_NAMES:
                metrics |= {"name": 1.0, "message": 2.0, "a\nb\x1b[31m": 3.0}
                seconds = {"evaluate": float("nan"), "train": -5.0, "ok": 1.0}
            if self.fault is Fault.EVALUATES_THE_WORLD:
                metrics, examples, tokens = {"loss": 0.01}, 1 << 52, 1 << 52
            outcome = pb.Outcome(
                assignment_id=assignment.id,
                examples=examples,
                tokens=tokens,
                metrics=metrics,
                phase_seconds=seconds,
            )
            self.send(outcome=outcome)
            return
        if self.fault is Fault.REFUSES:
            self.send(refusal=pb.Refusal(assignment_id=assignment.id, reason="policy permits nothing"))
        elif self.fault is Fault.TALKS_WITHOUT_END:
            self.send(failure=pb.Failure(assignment_id=assignment.id, reason="x" * 500_000))
        elif self.fault is Fault.REPEATS_ITSELF:
            while True:
                progress = pb.Progress(assignment_id=assignment.id, phase=pb.PHASE_TRAIN, done=3, total=9)
                self.send(progress=progress)
                self.repeated += 1
                await asyncio.sleep(0.1)
        elif self.fault is Fault.FAILS:
            self.send(failure=pb.Failure(assignment_id=assignment.id, reason="ValueError: no such file"))
        elif self.fault is not Fault.SILENT:
            if self.gate is not None:
                await self.gate.acquire()
            await asyncio.sleep(self.seconds)
            self._train(assignment, model)

    def _train(self, assignment: pb.Assignment, model: Path) -> None:
        if assignment.id not in self._updates:
            self.trained.append(assignment.id)
            path = self.folder / f"{assignment.id}.safetensors"
            tensors = load_file(model)
            if self.learn is not None:
                tensors = self.learn(tensors, assignment.round)
            else:
                tensors = {name: tensor + np.float32(self.step) for name, tensor in tensors.items()}
            _spoil(tensors, self.fault)
            save_file(tensors, path, metadata={"format": "pt"})
            if self.fault is Fault.NOT_SAFETENSORS:
                path.write_bytes(b"\x80\x04pickled" * 40)
            self._updates[assignment.id] = path
        path = self._updates[assignment.id]
        digest = digest_of_file(path)
        if self.fault is Fault.WRONG_DIGEST:
            digest = "blake3:" + "0" * 64
        if self.fault is Fault.NO_DIGEST:
            digest = ""
        examples = {Fault.NO_EXAMPLES: 0, Fault.TOO_MANY_EXAMPLES: 10**12}.get(self.fault, self.examples)
        size = path.stat().st_size + (10**9 if self.fault is Fault.TOO_LARGE else 0)
        tokens = (1 << 63) + 5 if self.fault is Fault.HUGE_NUMBERS else examples * 8
        outcome = pb.Outcome(
            assignment_id=assignment.id,
            update_digest=digest,
            update_bytes=size,
            examples=examples,
            tokens=tokens,
            metrics={"loss": 2.5},
            phase_seconds={"train": 0.1},
        )
        self.send(outcome=outcome)

    async def _upload(self, grant: pb.UploadGrant) -> None:
        self.granted = True
        if self.fault is Fault.NEVER_UPLOADS:
            return
        path = self._updates[grant.assignment_id]
        if self.fault is Fault.ANNOUNCES_ANOTHER:
            other = pb.Outcome(
                assignment_id=grant.assignment_id,
                update_digest=f"blake3:{secrets.token_hex(32)}",
                update_bytes=path.stat().st_size,
                examples=1,
            )
            self.send(outcome=other)
        try:
            if self.fault is Fault.CORRUPT_CHUNK:
                await self._send_corrupt(grant, path)
            if self.fault is Fault.CUT_ONCE:
                self.fault = Fault.NONE
                await self._send_half(grant, path)
                return
            self.receipts.append(await upload(self.transfer, grant.upload, path, grant.offset))
        except FederationError as error:
            self.errors.append(str(error))
        except grpc.aio.AioRpcError as error:
            self.errors.append(error.details() or "")

    async def _send_corrupt(self, grant: pb.UploadGrant, path: Path) -> None:
        async def corrupt() -> AsyncIterator[bytes]:
            async for _, message in messages_of(path, grant.offset, grant.upload):
                yield message[:-1] + bytes([message[-1] ^ 1])

        await self.transfer.write(corrupt())

    async def _send_half(self, grant: pb.UploadGrant, path: Path) -> None:
        """Break off after 60 bytes, ask where to go on, go on there."""
        whole = path.read_bytes()

        async def half() -> AsyncIterator[bytes]:
            yield Chunk.of(whole[:60], 0, grant.upload).encode()

        with contextlib.suppress(grpc.aio.AioRpcError):
            await self.transfer.write(half())
        held = await self.transfer.query_write(transfer_pb2.QueryWriteRequest(upload=grant.upload))
        assert 0 < held.committed_bytes < len(whole)
        assert not held.complete
        self.resumed_at = held.committed_bytes
        self.receipts.append(await upload(self.transfer, grant.upload, path, held.committed_bytes))


def _spoil(tensors: dict[str, np.ndarray], fault: Fault) -> None:
    match fault:
        case Fault.NAN:
            tensors["layer.weight"][1, 2] = np.nan
        case Fault.MISSING_TENSOR:
            del tensors["layer.bias"]
        case Fault.SURPLUS_TENSOR:
            tensors["layer.extra"] = np.zeros(3, np.float32)
        case Fault.WRONG_SHAPE:
            tensors["layer.bias"] = np.zeros((1,), np.float32)
        case Fault.WRONG_DTYPE:
            tensors["layer.bias"] = tensors["layer.bias"].astype(np.float64)


INITIAL = {
    "layer.weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "layer.bias": np.linspace(-1, 1, 4, dtype=np.float32),
}


def spec_of(**changes: object) -> RunSpec:
    content = {
        "name": "tiny",
        "model": {"config": {"model_type": "gpt2"}},
        "data": "text",
        "rounds": 1,
        "local": {"steps": 100, "batch_examples": 100},
        "cohort": {"stall_s": 20},
    }
    return RunSpec.model_validate(content | changes)


class Bench:
    """A coordinator and its fake sites."""

    def __init__(self, running: Coordinator, folder: Path) -> None:
        self.running = running
        self.folder = folder
        self.sites: dict[str, FakeSite] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def site(
        self, name: str, *, step: float = 1.0, examples: int = 10, fault: Fault = Fault.NONE
    ) -> FakeSite:
        site = FakeSite(
            self.running.port, name, self.folder / name, step=step, examples=examples, fault=fault
        )
        return self.attach(site)

    def attach(self, site: FakeSite) -> FakeSite:
        site._port = self.running.port
        self.sites[site.name] = site
        self.tasks[site.name] = asyncio.create_task(site.attend())
        return site

    async def detach(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.wait([self.tasks[name]])

    async def enqueue(
        self, spec: RunSpec, tensors: dict[str, np.ndarray] | None = None, *, priority: int = 0
    ) -> Run:
        folder = self.folder / "initial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(tensors or INITIAL, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        return await self.running.runs.submissions.enqueue(spec, folder, priority=priority)

    async def until(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while not holds():  # noqa: ASYNC110 (any condition at all)
                await asyncio.sleep(0.01)

    async def ended(self, run: Run, seconds: float = 20) -> Run:
        await self.until(lambda: self.running.store.run(run.id).state.is_end, seconds)
        return self.running.store.run(run.id)

    async def in_state(self, run: Run, *states: str, seconds: float = 20) -> Run:
        await self.until(lambda: self.running.store.run(run.id).state in states, seconds)
        return self.running.store.run(run.id)

    async def waits(self, run: Run, why: str, seconds: float = 20) -> Run:
        """The run as soon as it waits for a reason that holds a text."""
        await self.until(lambda: why in self.running.store.run(run.id).reason, seconds)
        return await self.in_state(run, "waiting")

    def model(self, run: Run) -> dict[str, np.ndarray]:
        store = self.running.store
        return load_file(store.files.path(store.run(run.id).model_digest))

    def outcomes(self, run: Run, number: int = 1) -> dict[str, tuple[str, str]]:
        """State and reason of each site's training in a round."""
        return {
            a.site: (str(a.state), a.reason)
            for a in self.running.store.assignments(run.id, number)
            if a.work == "train"
        }


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgresql.Server]:
    """A real PostgreSQL server; started once, for those who use it."""
    with postgresql.server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return None
    url: str = request.getfixturevalue("postgres").new_database()
    return url


@pytest.fixture
def config(tmp_path: Path) -> CoordinatorConfig:
    return CoordinatorConfig(listen="127.0.0.1:0", insecure=True, state_dir=tmp_path / "state", drain_s=0.2)


@pytest.fixture
async def bench(config: CoordinatorConfig, tmp_path: Path) -> AsyncIterator[Bench]:
    async with coordinator(config) as running:
        bench = Bench(running, tmp_path / "sites")
        yield bench
        for name in bench.tasks:
            await bench.detach(name)


@pytest.fixture
def fault() -> type[Fault]:
    return Fault


@pytest.fixture
def spec() -> Callable[..., RunSpec]:
    return spec_of


@pytest.fixture
def initial() -> dict[str, np.ndarray]:
    return INITIAL


@pytest.fixture
async def bench_of(tmp_path: Path) -> AsyncIterator[Callable[[Coordinator], Bench]]:
    """For tests that start their coordinators themselves."""
    benches = []

    def make(running: Coordinator) -> Bench:
        benches.append(Bench(running, tmp_path / "sites"))
        return benches[-1]

    yield make
    for bench in benches:
        for name in bench.tasks:
            await bench.detach(name)
