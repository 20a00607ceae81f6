"""The end of a coordinator: what is under way may end, nothing begins, and nothing is lost."""

import asyncio

import grpc
import pytest

from fedloom.v1 import runs_pb2
from fedloom.v1.runs_pb2_grpc import RunServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.chunks import Chunk
from fedloom_common.errors import Unreachable
from fedloom_common.identity import Peer, Role
from fedloom_common.rpc import federation_errors
from fedloom_common.transfer import TransferStub
from fedloom_server.app import coordinator
from fedloom_server.rpc.calls import WRITE


class Patient:
    """A coordinator that is told to end while an upload has come half way."""

    def __init__(self, config, bench_of, spec, fault):
        self.config = config.model_copy(update={"drain_s": 20.0})
        self.make_bench, self._spec, self._fault = bench_of, spec, fault
        self._end = asyncio.Event()
        self._up = asyncio.Event()

    async def live(self):
        async with coordinator(self.config) as self.running:
            self.bench = self.make_bench(self.running)
            self._up.set()
            await self._end.wait()

    async def begin_upload(self):
        self.task = asyncio.create_task(self.live())
        await self._up.wait()
        self.site = self.bench.site("oslo", fault=self._fault.NEVER_UPLOADS)
        self.run = await self.bench.enqueue(self._spec(evaluation={"every_rounds": 0}))
        await self.bench.until(lambda: self.site.granted)
        [self.name] = self.site._updates
        self.update = self.site._updates[self.name].read_bytes()
        self.go_on = asyncio.Event()
        self.writing = asyncio.create_task(self._write())
        await self.bench.until(lambda: self.running.calls.under_way[WRITE] == 1)

    async def _write(self):
        async with open_channel(f"127.0.0.1:{self.running.port}", None, Peer(Role.SITE, "oslo")) as channel:

            async def halves():
                yield Chunk.of(self.update[:60], 0, self.name).encode()
                await self.go_on.wait()
                yield Chunk.of(self.update[60:], 60, "").encode()

            return await TransferStub(channel).write(halves())

    async def drain(self):
        self._end.set()
        await self.bench.until(lambda: self.running.calls.is_draining)


@pytest.fixture
async def patient(config, bench_of, spec, fault):
    patient = Patient(config, bench_of, spec, fault)
    await patient.begin_upload()
    yield patient
    patient.go_on.set()
    await asyncio.wait([patient.task, patient.writing], timeout=60)


async def test_an_upload_under_way_ends_and_counts(patient):
    await patient.drain()
    await asyncio.sleep(0.3)
    assert not patient.task.done(), "it waits for the upload"
    patient.go_on.set()

    receipt = await patient.writing
    await patient.task

    assert receipt.size_bytes == len(patient.update)
    async with coordinator(patient.config) as again:
        assert again.store.assignment(patient.name).state == "done"
        assert (await patient.make_bench(again).ended(patient.run)).state == "finished"


async def test_no_other_call_begins_but_health(patient):
    await patient.drain()

    operator = Peer(Role.OPERATOR, "ann")
    async with open_channel(f"127.0.0.1:{patient.running.port}", None, operator) as channel:
        with pytest.raises(Unreachable, match="restart"), federation_errors("the coordinator"):
            await RunServiceStub(channel).List(runs_pb2.ListRequest(), timeout=60)
    site = patient.bench.attach(patient.site)
    await patient.bench.until(lambda: site.errors)
    assert "going away for a restart" in site.errors[-1]


async def test_a_call_that_does_not_end_is_cut_off_after_the_grace(patient, caplog):
    object.__setattr__(patient.config, "drain_s", 0.5)
    await patient.drain()

    async with asyncio.timeout(60):
        await patient.task

    with pytest.raises(grpc.aio.AioRpcError):
        await patient.writing
    assert "calls are cut off" in caplog.text
