import asyncio

import grpc
import numpy as np
import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom.v1 import transfer_pb2
from fedloom_common.channels import open_channel
from fedloom_common.chunks import Chunk
from fedloom_common.errors import NotPermitted, ProtocolError, WrongState
from fedloom_common.identity import Peer, Role
from fedloom_common.transfer import TransferStub, download, upload
from fedloom_server.app import coordinator


@pytest.fixture
async def finished(bench, spec):
    bench.site("a")
    run = await bench.ended(await bench.enqueue(spec()))
    return run, f"{run.id}.1.1.train.a"


async def test_a_repeated_upload_is_answered_again_and_counts_once(bench, finished):
    run, name = finished
    site = bench.sites["a"]
    before = bench.running.store.run(run.id).model_digest
    receipt = await upload(site.transfer, name, site.folder / f"{name}.safetensors", 0)
    assert receipt == site.receipts[0]
    assert bench.running.store.run(run.id).model_digest == before


async def test_a_sites_upload_belongs_to_it_alone(bench, finished):
    _, name = finished
    thief = bench.site("thief")
    await bench.until(lambda: hasattr(thief, "transfer"))
    with pytest.raises(NotPermitted, match="this site has no upload"):
        await upload(thief.transfer, name, bench.sites["a"].folder / f"{name}.safetensors", 0)


async def test_an_unknown_upload_is_refused(bench, finished):
    site = bench.sites["a"]
    path = next(site.folder.glob("*.safetensors"))
    with pytest.raises(NotPermitted, match="this site has no upload"):
        await upload(site.transfer, "made.up", path, 0)
    with pytest.raises(ProtocolError, match="names its upload"):
        await upload(site.transfer, "", path, 0)


async def test_a_late_upload_is_refused(bench, spec, clock, fault):
    bench.site("good")
    late = bench.site("late", fault=fault.SILENT)
    cohort = {"min_sites": 2, "quorum": 1, "stall_s": 0.5}
    run = await bench.enqueue(spec(cohort=cohort))
    await bench.until(lambda: bench.outcomes(run).get("good") == ("done", "") and late.asked)
    clock.now_s += 1
    run = await bench.ended(run)
    path = next(bench.sites["good"].folder.glob("*.safetensors"))
    with pytest.raises(WrongState, match=r"no progress for 0\.5 s"):
        await upload(late.transfer, f"{run.id}.1.1.train.late", path, 0)


@pytest.mark.parametrize("digest", ["blake3:" + "0" * 64, "../../etc/passwd", "blake3:../../x", ""])
async def test_read_serves_stored_files_and_nothing_else(bench, finished, digest):
    async with open_channel(f"127.0.0.1:{bench.running.port}", None, Peer(Role.VIEWER, "bob")) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [chunk async for chunk in TransferStub(channel).read(transfer_pb2.ReadRequest(digest=digest))]
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_downloads_beyond_the_cap_wait_their_turn_and_a_cancelled_one_leaves_it(
    config, bench_of, spec, monkeypatch
):
    monkeypatch.setattr("fedloom_server.rpc.transfer.CHUNK_BYTES", 10)
    async with coordinator(config.model_copy(update={"concurrent_downloads": 1})) as running:
        bench = bench_of(running)
        for name in "abc":
            bench.site(name)
        run = await bench.ended(await bench.enqueue(spec(cohort={"min_sites": 3})))
        assert run.state == "finished"
        request = transfer_pb2.ReadRequest(digest=run.model_digest)
        stub = bench.sites["a"].transfer
        for _ in range(3):
            call = stub.read(request)
            await call.read()
            call.cancel()
        assert await asyncio.wait_for(stub.read(request).read(), 60)


async def test_a_site_that_reads_nothing_of_what_it_asks_for_keeps_no_other_from_reading(
    config, tmp_path, bench_of, monkeypatch
):
    async with coordinator(config.model_copy(update={"concurrent_downloads": 3})) as running:
        path = tmp_path / "large"
        path.write_bytes(bytes(16 << 20))
        stored = running.store.files.put(path)
        monkeypatch.setattr(
            "fedloom_server.assignments.names_to", lambda database, site, digest: digest == stored.digest
        )
        bench = bench_of(running)
        hostile, honest = bench.site("hostile"), bench.site("honest")
        await bench.until(lambda: all(running.sites.link(name) for name in bench.sites))
        calls = [hostile.transfer.read(transfer_pb2.ReadRequest(digest=stored.digest)) for _ in range(6)]
        await calls[-1].initial_metadata()
        async with asyncio.timeout(60):
            await download(honest.transfer, stored.digest, stored.size_bytes, tmp_path / "got")
        assert (tmp_path / "got").stat().st_size == stored.size_bytes
        for call in calls:
            call.cancel()


async def test_read_beyond_the_end_is_refused(bench, finished):
    run, _ = finished
    stub = bench.sites["a"].transfer
    request = transfer_pb2.ReadRequest(digest=run.model_digest, offset=1 << 40)
    with pytest.raises(grpc.aio.AioRpcError, match="lies outside the file"):
        _ = [chunk async for chunk in stub.read(request)]


async def test_operators_may_not_write(bench, finished):
    _, name = finished
    path = next(bench.sites["a"].folder.glob("*.safetensors"))
    operator = Peer(Role.OPERATOR, "ann")
    async with open_channel(f"127.0.0.1:{bench.running.port}", None, operator) as channel:
        with pytest.raises(NotPermitted, match="operator ann may not call"):
            await upload(TransferStub(channel), name, path, 0)


class Stream:
    """An upload whose chunks are sent one by one, and which is held open between them."""

    def __init__(self, stub: TransferStub) -> None:
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.call = stub.write(self._messages())

    async def _messages(self):
        while (message := await self._chunks.get()) is not None:
            yield message

    def send(self, payload: bytes, offset: int, upload: str = "") -> None:
        self._chunks.put_nowait(Chunk.of(payload, offset, upload).encode())

    def end(self) -> None:
        self._chunks.put_nowait(None)


async def test_one_stream_at_a_time_has_an_upload_open(bench, spec, fault, initial):
    """The one behind could write on after the update is folded, into the next that arrives in its place."""
    site = bench.site("a", step=2.0, fault=fault.NEVER_UPLOADS)
    run = await bench.enqueue(spec(cohort={"min_sites": 1}))
    await bench.until(lambda: site.granted)
    name = f"{run.id}.1.1.train.a"
    path = site.folder / f"{name}.safetensors"
    whole, first, second = path.read_bytes(), Stream(site.transfer), Stream(site.transfer)
    first.send(whole, 0, name)
    await bench.until(lambda: bench.running.store.spool.update_path(assignment_of(bench, name)).exists())
    second.send(whole[:60], 0, name)
    with pytest.raises(grpc.aio.AioRpcError, match="goes on at byte"):
        await asyncio.wait_for(second.call, 60)
    first.end()
    with pytest.raises(grpc.aio.AioRpcError, match="taken this upload over"):
        await asyncio.wait_for(first.call, 60)
    held = await site.transfer.query_write(transfer_pb2.QueryWriteRequest(upload=name))
    assert await upload(site.transfer, name, path, held.committed_bytes)
    assert (await bench.ended(run)).state == "finished"
    np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 2, rtol=1e-6)


async def test_a_stream_whose_assignment_has_ended_writes_into_no_other_update(bench, spec, fault):
    good, late = bench.site("good"), bench.site("late", fault=fault.NEVER_UPLOADS)
    cohort = {"min_sites": 2, "quorum": 1}
    run = await bench.enqueue(spec(rounds=2, cohort=cohort, evaluation={"initial": False}))
    await bench.until(lambda: late.granted)
    name = f"{run.id}.1.1.train.late"
    stream = Stream(late.transfer)
    stream.send((late.folder / f"{name}.safetensors").read_bytes()[:60], 0, name)
    await bench.until(lambda: bench.running.store.spool.update_path(assignment_of(bench, name)).exists())
    await bench.until(lambda: good.receipts)
    good.fault = late.fault = fault.SILENT
    late.send(failure=pb.Failure(assignment_id=name, reason="out of memory"))
    await bench.until(lambda: bench.outcomes(run, 2))
    before = spare_contents(bench)
    assert len(before) == 1
    stream.end()
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(stream.call, 60)
    assert spare_contents(bench) == before


async def test_a_stream_whose_run_has_ended_writes_into_no_other_update(bench, spec, fault):
    site = bench.site("a", fault=fault.NEVER_UPLOADS)
    stopped = await bench.enqueue(spec(evaluation={"initial": False}))
    await bench.until(lambda: site.granted)
    name = f"{stopped.id}.1.1.train.a"
    stream = Stream(site.transfer)
    stream.send((site.folder / f"{name}.safetensors").read_bytes()[:60], 0, name)
    await bench.until(lambda: bench.running.store.spool.update_path(assignment_of(bench, name)).exists())
    site.fault = fault.SILENT
    other = await bench.enqueue(spec(evaluation={"initial": False}))  # it might write over what is left
    await bench.until(lambda: bench.outcomes(other))
    await bench.running.runs.stop(stopped.id, "")
    assert spare_contents(bench) == {}
    stream.end()
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(stream.call, 60)
    assert not list(bench.running.store.spool.folder.iterdir())


async def test_an_upload_that_lies_in_a_larger_spare_without_its_mark_begins_again(bench, spec, fault):
    site = bench.site("a", fault=fault.NEVER_UPLOADS)
    run = await bench.enqueue(spec(cohort={"min_sites": 1}))
    await bench.until(lambda: site.granted)
    name = f"{run.id}.1.1.train.a"
    bench.running.store.spool.update_path(assignment_of(bench, name)).write_bytes(bytes(10_000))
    held = await site.transfer.query_write(transfer_pb2.QueryWriteRequest(upload=name))
    assert held.committed_bytes == 0
    assert await upload(site.transfer, name, site.folder / f"{name}.safetensors", 0)
    assert (await bench.ended(run)).state == "finished"


def assignment_of(bench, name):
    return bench.running.store.assignment(name)


def spare_contents(bench) -> dict[str, bytes]:
    folder = bench.running.store.spool.folder.with_name("spares")
    return {path.name: path.read_bytes() for path in folder.iterdir()}
