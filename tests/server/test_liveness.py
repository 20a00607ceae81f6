"""Sessions that live, and sessions that are dead."""

import asyncio
import contextlib

import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.identity import Peer, Role
from fedloom_common.requirements import Require
from fedloom_server import sites as sites_module
from fedloom_server.app import coordinator
from fedloom_server.eligibility import Description, Wanted
from fedloom_server.roster import Roster
from fedloom_server.rpc import federation
from fedloom_server.sites import Sites
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
    tmp_path, monkeypatch
):
    store = Store(tmp_path)
    sites = Sites(Roster(store))
    looks = 0

    def shortfall(*arguments: object, **more: object) -> str:
        nonlocal looks
        looks += 1
        return str(looks)

    monkeypatch.setattr(sites_module, "shortfall", shortfall)
    wanted = Wanted(data="texts", require=Require())
    waiting = asyncio.create_task(sites.wait_for(501, wanted, lambda told: None))
    attached = [
        sites.attached(f"s{number}", Description(data_sets={"texts": 1}), Mute()) for number in range(500)
    ]
    clock = asyncio.get_running_loop().time
    began_s = clock()
    for session in attached:
        session.__enter__()
        await asyncio.sleep(0)
    await asyncio.sleep(sites_module.LOOK_S * 2)
    assert 2 <= looks <= 2 + (clock() - began_s) / sites_module.LOOK_S < 100
    with sites.attached("last", Description(data_sets={"texts": 1}), Mute()):
        assert len(await asyncio.wait_for(waiting, 5)) == 501
    for session in attached:
        session.__exit__(None, None, None)
    store.close()


async def test_sites_that_attach_together_are_written_together(config, bench_of, monkeypatch):
    written = []
    save_sites = Store.save_sites
    monkeypatch.setattr(
        Store, "save_sites", lambda store, records: (written.append(len(records)), save_sites(store, records))
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
