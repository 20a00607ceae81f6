"""A site that speaks the protocol, with a certificate, and does one thing wrong."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
from faults.federation import Federation
from faults.nullsite import Tensors, drifted
from safetensors.numpy import load, save

from fedloom.v1 import session_pb2 as pb
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom.v1.transfer_pb2 import QueryWriteRequest
from fedloom_common.channels import open_channel
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import FederationError
from fedloom_common.identity import TlsFiles
from fedloom_common.rpc import federation_errors
from fedloom_common.transfer import TransferStub, download, messages_of, upload

CHUNK_LIES = ("corrupt", "duplicated", "reordered", "skipped", "truncated")
"""What happens to the chunks of an update the first time; then it is sent as it should be."""
CONTENT_LIES = {
    "nan": "holds nan",
    "infinite": "holds -inf",
    "shape": "shape",
    "dtype": "F64",
    "renamed": "tensor",
    "missing": "tensor",
    "surplus": "extra is not in the model",
    "pickled": "safetensors",
    "short-file": "bytes",
}
"""What is wrong with an update, and a word of the reason for which it is rejected."""
COUNT_LIES = {"none": 0, "too-many": 17, "absurd": (1 << 53) + 1, "more-absurd": (1 << 64) - 1}
"""The examples that a site claims, of at most 16."""


class Liar:
    """A site whose name is its lie."""

    def __init__(self, federation: Federation, name: str) -> None:
        self.name = name
        self.refusals: list[str] = []
        """What the coordinator said to it."""
        self.receipts = 0
        folder = federation.site_folder(name)
        self._address = f"localhost:{federation.port}"
        self._tls = TlsFiles(ca=folder / "ca.crt", certificate=folder / "site.crt", key=folder / "site.key")
        self._folder = folder
        self._outbox: asyncio.Queue[pb.SiteMessage] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def attend(self) -> None:
        """One session, until it is cancelled."""
        async with open_channel(self._address, self._tls, None) as channel:
            self._transfer = TransferStub(channel)
            data = [pb.DataSet(name="texts", size_bytes=1000)]
            self._send(hello=pb.Hello(protocol_version=1, software="liar", data_sets=data))
            beating = asyncio.create_task(self._beat())
            try:
                async for message in FederationServiceStub(channel).Attach(self._messages()):
                    self._take(message)
            finally:
                for task in (beating, *self._tasks):
                    task.cancel()

    def _take(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("kind"):
            case "assignment":
                work = self._train(message.assignment)
            case "upload_grant":
                work = self._deliver(message.upload_grant)
            case _:
                return
        task = asyncio.create_task(work)
        self._tasks.add(task)

    def _send(self, **kind: object) -> None:
        self._outbox.put_nowait(pb.SiteMessage(**kind))  # type: ignore[arg-type]

    async def _messages(self) -> AsyncIterator[pb.SiteMessage]:
        while True:
            yield await self._outbox.get()

    async def _beat(self) -> None:
        while True:
            self._send(heartbeat=pb.Heartbeat())
            await asyncio.sleep(1)

    async def _train(self, assignment: pb.Assignment) -> None:
        model, self._update = self._folder / "model", self._folder / "update"
        await download(self._transfer, assignment.model.digest, assignment.model.size_bytes, model)
        honest = drifted(load(model.read_bytes()), self.name, assignment.round)
        self._update.write_bytes(_spoilt(honest, self.name))
        self._send(
            outcome=pb.Outcome(
                assignment_id=assignment.id,
                update_digest=digest_of_file(self._update),
                update_bytes=self._update.stat().st_size,
                examples=COUNT_LIES.get(self.name, 1),
                metrics={"loss": 1.5},
            )
        )

    async def _deliver(self, grant: pb.UploadGrant) -> None:
        try:
            if self.name in CHUNK_LIES:
                await self._send_wrongly(grant)
            held = await self._transfer.query_write(QueryWriteRequest(upload=grant.upload))
            await upload(self._transfer, grant.upload, self._update, held.committed_bytes)
            self.receipts += 1
        except FederationError as error:
            self.refusals.append(str(error))

    async def _send_wrongly(self, grant: pb.UploadGrant) -> None:
        chunks = [message async for _, message in messages_of(self._update, grant.offset, grant.upload)]

        async def wrong() -> AsyncIterator[bytes]:
            for chunk in _disordered(chunks, self.name):
                yield chunk

        with contextlib.suppress(FederationError), federation_errors("the coordinator"):
            try:
                await self._transfer.write(wrong())
                self.receipts += 100  # what is sent so must never be receipted
            except Exception as error:
                self.refusals.append(str(error))
                raise


def _disordered(chunks: list[bytes], lie: str) -> list[bytes]:
    first, second, third, *rest = chunks
    match lie:
        case "corrupt":
            return [first, second[:-1] + bytes([second[-1] ^ 1]), third, *rest]
        case "duplicated":
            return [first, second, second, third, *rest]
        case "reordered":
            return [first, third, second, *rest]
        case "skipped":
            return [first, third, *rest]
        case _:
            return [first, second, third]


def _spoilt(tensors: Tensors, lie: str) -> bytes:
    """The update's file."""
    name = min(tensors)
    changed: dict[str, np.ndarray] = dict(tensors)
    match lie:
        case "nan":
            changed[name].flat[5] = np.nan
        case "infinite":
            changed[name].flat[5] = -np.inf
        case "shape":
            changed[name] = tensors[name].reshape(-1, 1)
        case "dtype":
            changed[name] = tensors[name].astype(np.float64)
        case "renamed":
            changed["x." + name[2:]] = changed.pop(name)
        case "missing":
            del changed[name]
        case "surplus":
            changed["extra"] = tensors[name]
    content = save(changed, {"format": "pt"})
    if lie == "pickled":
        return b"\x80\x04" + content[2:]
    return content[: len(content) // 2] if lie == "short-file" else content
