import asyncio

import grpc
import pytest
from blake3 import blake3

from fedloom.v1 import runs_pb2 as pb
from fedloom.v1 import transfer_pb2
from fedloom.v1.runs_pb2_grpc import RunServiceStub
from fedloom.v1.transfer_pb2_grpc import TransferServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.identity import Peer, Role
from fedloom_server.records import Assignment
from fedloom_server.rpc import runs


@pytest.fixture
async def channel(bench):
    async with open_channel(f"127.0.0.1:{bench.running.port}", None, Peer(Role.OPERATOR, "ann")) as channel:
        yield channel


async def test_watch_tells_of_every_round_and_ends_with_the_run(bench, spec, channel):
    run = await bench.enqueue(spec(rounds=2))
    events = []

    async def watch() -> None:
        async for event in RunServiceStub(channel).Watch(pb.WatchRequest(run_id=run.id[:5])):
            events.append(event)  # noqa: PERF401 (the test looks at them as they come)

    watching = asyncio.create_task(watch())
    await bench.until(lambda: events)
    bench.site("a")
    await asyncio.wait_for(watching, 60)
    assert events[-1].run.state == pb.RUN_STATE_FINISHED
    finished = {e.round.number for e in events if e.round.state == pb.ROUND_STATE_FINISHED}
    assert finished == {0, 1, 2}


async def test_a_page_of_a_runs_rounds_reads_no_rows_of_other_rounds(bench, spec, channel, monkeypatch):
    bench.site("a")
    run = await bench.ended(await bench.enqueue(spec(rounds=5, evaluation={"initial": False})))
    monkeypatch.setattr(runs, "PAGE_BYTES", 0)
    monkeypatch.setattr(runs, "ROUNDS_AT_ONCE", 2)
    store, loaded = bench.running.store, set()
    read = store._all

    def noting(query):
        found = read(query)
        loaded.update(row.round for row in found if isinstance(row, Assignment))
        return found

    monkeypatch.setattr(store, "_all", noting)
    page = await RunServiceStub(channel).Get(pb.GetRequest(run_id=run.id, from_round=3))
    assert ([told.number for told in page.rounds], page.next_round) == ([3], 4)
    assert [site.site for site in page.rounds[0].sites] == ["a", "a"]
    assert loaded == {3, 4}
    last = await RunServiceStub(channel).Get(pb.GetRequest(run_id=run.id, from_round=5))
    assert ([told.number for told in last.rounds], last.HasField("next_round")) == ([5], False)


async def test_watching_an_ended_run_tells_it_all_and_returns(bench, spec, channel):
    bench.site("a")
    run = await bench.ended(await bench.enqueue(spec(rounds=2)))
    events = [e async for e in RunServiceStub(channel).Watch(pb.WatchRequest(run_id=run.id))]
    assert events[0].run.reason == "all 2 rounds are done"
    assert [e.round.number for e in events[1:]] == [0, 1, 2]


async def test_export_names_files_that_read_serves(bench, spec, channel):
    bench.site("a", examples=40)
    run = await bench.ended(await bench.enqueue(spec(rounds=2)))
    answer = await RunServiceStub(channel).Export(pb.ExportRequest(run_id=run.id))
    assert {file.name for file in answer.files} == {"model.safetensors", "config.json"}
    for file in answer.files:
        request = transfer_pb2.ReadRequest(digest=file.digest)
        content = b"".join([c.payload async for c in TransferServiceStub(channel).Read(request)])
        assert file.digest == f"blake3:{blake3(content).hexdigest()}"
        assert file.size_bytes == len(content)
    assert "| a |" in answer.model_card
    first = await RunServiceStub(channel).Export(pb.ExportRequest(run_id=run.id, round=1))
    assert first.files[0].digest != answer.files[0].digest
    with pytest.raises(grpc.aio.AioRpcError, match="has no model of round 7; it has 0, 1, 2"):
        await RunServiceStub(channel).Export(pb.ExportRequest(run_id=run.id, round=7))


async def test_get_counts_bytes_and_examples_of_each_site(bench, spec, channel):
    bench.site("a", examples=40)
    run = await bench.ended(await bench.enqueue(spec()))
    answer = await RunServiceStub(channel).Get(pb.GetRequest(run_id=run.id))
    trained = next(site for site in answer.rounds[1].sites if site.work == 1)
    size = (bench.running.store.files.path(run.model_digest)).stat().st_size
    assert (trained.site, trained.state, trained.examples) == ("a", "done", 40)
    assert trained.bytes_up == size
    assert sum(s.bytes_down for r in answer.rounds for s in r.sites) == 2 * size
    assert trained.phase_seconds == {"train": pytest.approx(0.1)}


async def test_a_wrong_spec_is_refused_with_every_mistake(bench, channel):
    spec = "{name: Bad Name, model: {}, data: text, rounds: 0, local: {steps: 1}, round: 3}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await RunServiceStub(channel).Submit(pb.SubmitRequest(spec=spec))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for path in ("name:", "model:", "rounds:", "round: no such key"):
        assert path in caught.value.details()
    assert not bench.running.store.runs()


async def test_run_ids_must_name_one_run(bench, spec, channel):
    run = await bench.enqueue(spec())
    other = await bench.enqueue(spec())
    stub = RunServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError, match="there is no run 'zzz'"):
        await stub.Get(pb.GetRequest(run_id="zzz"))
    if run.id[0] == other.id[0]:
        with pytest.raises(grpc.aio.AioRpcError, match="several runs begin with"):
            await stub.Get(pb.GetRequest(run_id=run.id[0]))
    assert (await stub.Get(pb.GetRequest(run_id=run.id))).run.id == run.id


async def test_a_queued_run_can_be_stopped_and_resumed(bench, spec, channel):
    stub = RunServiceStub(channel)
    run = await bench.enqueue(spec())
    stopped = await stub.Stop(pb.StopRequest(run_id=run.id, reason="wrong data"))
    assert (stopped.state, stopped.reason) == (pb.RUN_STATE_STOPPED, "wrong data")
    with pytest.raises(grpc.aio.AioRpcError, match="has ended already"):
        await stub.Stop(pb.StopRequest(run_id=run.id))
    await stub.Resume(pb.ResumeRequest(run_id=run.id))
    bench.site("a")
    assert (await bench.ended(run)).state == "finished"
    with pytest.raises(grpc.aio.AioRpcError, match="only a paused, waiting, stopped or failed"):
        await stub.Resume(pb.ResumeRequest(run_id=run.id))


async def test_sites_are_listed_with_what_they_said(bench, channel):
    bench.site("a")
    await bench.until(lambda: bench.running.sites.link("a") is not None)
    (site,) = (await RunServiceStub(channel).ListSites(pb.ListSitesRequest())).sites
    assert (site.name, site.connected, site.hello.software) == ("a", True, "fake")
    assert site.hello.data_sets[0].name == "text"
    await bench.detach("a")
    await bench.until(lambda: bench.running.sites.link("a") is None)
    (site,) = (await RunServiceStub(channel).ListSites(pb.ListSitesRequest())).sites
    assert not site.connected
