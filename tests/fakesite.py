"""A site that speaks the protocol but trains nothing."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import numpy as np
from safetensors.numpy import load_file, save_file
from sitefaults import Fault, Tensors, spoil

from fedloom.v1 import session_pb2 as pb
from fedloom.v1 import transfer_pb2
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.chunks import Chunk
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import FederationError
from fedloom_common.identity import Peer, Role
from fedloom_common.transfer import TransferStub, download, messages_of, upload


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
        self.evaluate_gate: asyncio.Event | None = None
        """Lets evaluations end; they do at once without it."""
        self.alone_gate: asyncio.Event | None = None
        """Lets trainings alone end; they do at once without it."""
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
        self.evaluates_only = False
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
                evaluates_only=self.evaluates_only,
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
        if assignment.work == pb.WORK_TRAIN:
            await self._train(assignment, model)
        elif assignment.work == pb.WORK_ALONE:
            await self._train_alone(assignment, load_file(model))
        elif self.fault is not Fault.NEVER_EVALUATES:
            if self.evaluate_gate is not None:
                await self.evaluate_gate.wait()
            self._evaluate(assignment, load_file(model))

    def _measured(self, tensors: Tensors) -> dict[str, float]:
        loss = 10.0 - float(np.mean([tensor.mean() for tensor in tensors.values()]))
        if self.measure is not None:
            loss = self.measure(tensors)
        return {"loss": loss, "perplexity": float(np.exp(loss))}

    def _evaluate(self, assignment: pb.Assignment, tensors: Tensors) -> None:
        metrics = self._measured(tensors)
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
            update_bytes=(1 << 64) - 1 if self.fault is Fault.HUGE_NUMBERS else 0,
        )
        self.send(outcome=outcome)

    async def _train_alone(self, assignment: pb.Assignment, tensors: Tensors) -> None:
        if self.fault is Fault.REFUSES_ALONE:
            self.send(refusal=pb.Refusal(assignment_id=assignment.id, reason="policy.alone is false"))
            return
        if self.alone_gate is not None:
            await self.alone_gate.wait()
        before = pb.Measurement(examples=self.examples, tokens=10, metrics=self._measured(tensors))
        step = np.float32(self.step * assignment.alone_rounds)
        trained = {name: tensor + step for name, tensor in tensors.items()}
        outcome = pb.Outcome(
            assignment_id=assignment.id, examples=self.examples, tokens=10, metrics=self._measured(trained),
            before=before, data_examples=self.examples,
        )  # fmt: skip
        self.send(outcome=outcome)

    async def _train(self, assignment: pb.Assignment, model: Path) -> None:
        match self.fault:
            case Fault.SILENT:
                pass
            case Fault.REFUSES:
                self.send(refusal=pb.Refusal(assignment_id=assignment.id, reason="policy permits nothing"))
            case Fault.FAILS:
                reason = "ValueError: no such file"
                self.send(failure=pb.Failure(assignment_id=assignment.id, reason=reason))
            case Fault.TALKS_WITHOUT_END:
                self.send(failure=pb.Failure(assignment_id=assignment.id, reason="x" * 500_000))
            case Fault.REPEATS_ITSELF:
                await self._repeat_itself(assignment)
            case _:
                if self.gate is not None:
                    await self.gate.acquire()
                await asyncio.sleep(self.seconds)
                self._offer(assignment, self._update_of(assignment, model), model)

    async def _repeat_itself(self, assignment: pb.Assignment) -> None:
        while True:
            progress = pb.Progress(assignment_id=assignment.id, phase=pb.PHASE_TRAIN, done=3, total=9)
            self.send(progress=progress)
            self.repeated += 1
            await asyncio.sleep(0.1)

    def _update_of(self, assignment: pb.Assignment, model: Path) -> Path:
        """The trained model's file, which is made when the assignment comes for the first time."""
        if assignment.id in self._updates:
            return self._updates[assignment.id]
        self.trained.append(assignment.id)
        path = self.folder / f"{assignment.id}.safetensors"
        tensors = load_file(model)
        if self.learn is not None:
            tensors = self.learn(tensors, assignment.round)
        else:
            tensors = {name: tensor + np.float32(self.step) for name, tensor in tensors.items()}
        spoil(tensors, self.fault)
        save_file(tensors, path, metadata={"format": "pt"})
        if self.fault is Fault.NOT_SAFETENSORS:
            path.write_bytes(b"\x80\x04pickled" * 40)
        self._updates[assignment.id] = path
        return path

    def _offer(self, assignment: pb.Assignment, path: Path, model: Path) -> None:
        digest = digest_of_file(path)
        if self.fault is Fault.WRONG_DIGEST:
            digest = "blake3:" + "0" * 64
        if self.fault is Fault.NO_DIGEST:
            digest = ""
        examples = {Fault.NO_EXAMPLES: 0, Fault.TOO_MANY_EXAMPLES: 10**12}.get(self.fault, self.examples)
        size = path.stat().st_size + (10**9 if self.fault is Fault.TOO_LARGE else 0)
        tokens = (1 << 63) + 5 if self.fault is Fault.HUGE_NUMBERS else examples * 8
        before = None
        if assignment.measures and self.fault is not Fault.NEVER_EVALUATES:
            metrics = self._measured(load_file(model))
            before = pb.Measurement(examples=self.examples, tokens=10, metrics=metrics)
        outcome = pb.Outcome(
            assignment_id=assignment.id,
            before=before,
            data_examples=self.examples,
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
