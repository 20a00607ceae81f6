"""Sessions that live, and sessions that are dead."""

import asyncio
import contextlib

import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.identity import Peer, Role
from fedloom_server.app import coordinator
from fedloom_server.eligibility import Description
from fedloom_server.roster import Site
from fedloom_server.rpc import federation
from fedloom_server.sites import LOOK_S, Sites
from fedloom_server.store import Store


async def test_a_site_that_misses_three_heartbeats_is_given_up_and_one_that_sends_them_is_not(
    config, bench_of, caplog
):
    async with coordinator(config.model_copy(update={"heartbeat_s": 0.2})) as running:
        bench = bench_of(running)
        alive, _ = bench.site("alive"), bench.site("dead")
        await bench.until(lambda: running.sites.link("alive") and running.sites.link("dead"))
        for _ in range(10):
            alive.send(heartbeat=pb.Heartbeat())
            await asyncio.sleep(0.2)
        assert running.sites.link("alive")
        assert not running.sites.link("dead")
        await bench.until(bench.tasks["dead"].done)
        assert bench.sites["dead"].errors == ["the site was silent for 0.6 s"]
    (line,) = [record for record in caplog.records if record.message == "site is silent"]
    assert (line.site, line.silence_s) == ("dead", pytest.approx(0.6))


async def test_heartbeats_are_rarer_the_more_sites_there_are(bench, monkeypatch):
    monkeypatch.setattr(federation, "HEARTBEATS_PER_S", 0.05)
    paces = []
    async with contextlib.AsyncExitStack() as channels:
        for number in range(5):
            peer = Peer(Role.SITE, f"s{number}")
            channel = await channels.enter_async_context(
                open_channel(f"127.0.0.1:{bench.running.port}", None, peer)
            )
            call = FederationServiceStub(channel).Attach()
            await call.write(pb.SiteMessage(hello=pb.Hello(protocol_version=1)))
            paces.append((await call.read()).welcome.heartbeat_s)
    assert paces == [20, 40, 60, 60, 60]


class Mute:
    """A link that nothing is sent over."""

    def close(self, reason: str) -> None: ...


async def test_a_run_that_waits_looks_at_the_sites_a_few_times_a_second_however_many_attach(
    bench, spec, monkeypatch
):
    looks = 0
    connected = Sites.connected

    def counted(sites: Sites) -> list[Site]:
        nonlocal looks
        looks += 1
        return connected(sites)

    run = await bench.enqueue(spec(cohort={"min_sites": 1000}))
    await bench.until(lambda: "0 of 1000 fit" in bench.running.store.run(run.id).reason)
    monkeypatch.setattr(Sites, "connected", counted)
    clock = asyncio.get_running_loop().time
    began_s = clock()
    with contextlib.ExitStack() as sessions:
        for number in range(500):
            about = Description(data_sets={"text": 1})
            sessions.enter_context(bench.running.sites.attached(f"s{number}", about, Mute()))
            await asyncio.sleep(0)
        await bench.until(lambda: "500 of 1000 fit" in bench.running.store.run(run.id).reason)
        assert 0 < looks <= 10 + 5 * (clock() - began_s) / LOOK_S < 250


async def test_sites_that_attach_together_are_written_together(config, bench_of, monkeypatch):
    written = []
    save = Store.save
    monkeypatch.setattr(
        Store, "save", lambda store, *records: (written.append(len(records)), save(store, *records))
    )
    async with coordinator(config) as running:
        bench = bench_of(running)
        for number in range(20):
            bench.site(f"s{number:02}")
        await bench.until(lambda: len(running.store.sites()) == 20)
        for name in list(bench.tasks):
            await bench.detach(name)
    assert len(written) < 10
    store = Store(config.state_dir)
    assert {record.name for record in store.sites()} == {f"s{number:02}" for number in range(20)}
    store.close()
