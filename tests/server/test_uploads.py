import asyncio

import grpc
import pytest

from fedloom.v1 import transfer_pb2
from fedloom_common.channels import open_channel
from fedloom_common.errors import NotFound, NotPermitted, ProtocolError, WrongState
from fedloom_common.identity import Peer, Role
from fedloom_common.transfer import TransferStub, upload
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
    with pytest.raises(NotPermitted, match="belongs to another site"):
        await upload(thief.transfer, name, bench.sites["a"].folder / f"{name}.safetensors", 0)


async def test_an_unknown_upload_is_refused(bench, finished):
    site = bench.sites["a"]
    path = next(site.folder.glob("*.safetensors"))
    with pytest.raises(NotFound, match="there is no upload"):
        await upload(site.transfer, "made.up", path, 0)
    with pytest.raises(ProtocolError, match="names its upload"):
        await upload(site.transfer, "", path, 0)


async def test_a_late_upload_is_refused(bench, spec, fault):
    bench.site("good")
    late = bench.site("late", fault=fault.SILENT)
    cohort = {"min_sites": 2, "quorum": 1, "stall_s": 0.5}
    run = await bench.ended(await bench.enqueue(spec(cohort=cohort)))
    path = next(bench.sites["good"].folder.glob("*.safetensors"))
    with pytest.raises(WrongState, match=r"no progress for 0\.5 s"):
        await upload(late.transfer, f"{run.id}.1.1.train.late", path, 0)


@pytest.mark.parametrize("digest", ["blake3:" + "0" * 64, "../../etc/passwd", "blake3:../../x", ""])
async def test_read_serves_stored_files_and_nothing_else(bench, finished, digest):
    stub = bench.sites["a"].transfer
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [chunk async for chunk in stub.read(transfer_pb2.ReadRequest(digest=digest))]
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
        assert await asyncio.wait_for(stub.read(request).read(), 5)


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
