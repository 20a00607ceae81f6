"""Sessions that live, and sessions that are dead."""

import asyncio
import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.identity import Peer, Role
from fedloom_server.app import coordinator
from fedloom_server.eligibility import Description
from fedloom_server.roster import Site
from fedloom_server.rpc import federation
from fedloom_server.rpc.links import Silence
from fedloom_server.sites import LOOK_S, Sites
from fedloom_server.store import Store


class Timers:
    """The event loop's clock and timers, as silence is measured by them: only a test lets time pass."""

    now_s = 0.0

    def __init__(self):
        self.due: list[tuple[float, Callable[[], None]]] = []

    def time(self):
        return self.now_s

    def call_later(self, delay_s, then):
        return self.call_at(self.now_s + delay_s, then)

    def call_at(self, at_s, then):
        self.due.append(timer := (at_s, then))
        return SimpleNamespace(cancel=lambda: self.due.remove(timer) if timer in self.due else None)

    def advance(self, seconds):
        self.now_s += seconds
        for timer in [timer for timer in self.due if timer[0] <= self.now_s]:
            self.due.remove(timer)
            timer[1]()


@pytest.fixture
def timers(monkeypatch):
    timers = Timers()
    clocked = SimpleNamespace(**vars(asyncio) | {"get_running_loop": lambda: timers})
    monkeypatch.setattr("fedloom_server.rpc.links.asyncio", clocked)
    return timers


@pytest.fixture
def heard(monkeypatch):
    """The silences that were broken."""
    told, broken = [], Silence.broken
    monkeypatch.setattr(Silence, "broken", lambda silence: (broken(silence), told.append(silence)))
    return told


async def test_a_site_that_misses_three_heartbeats_is_given_up_and_one_that_sends_them_is_not(
    config, bench_of, caplog, timers, heard
):
    async with coordinator(config.model_copy(update={"heartbeat_s": 0.2})) as running:
        bench = bench_of(running)
        alive, _ = bench.site("alive"), bench.site("dead")
        await bench.until(lambda: running.sites.link("alive") and running.sites.link("dead"))
        for beats in range(1, 10):
            alive.send(heartbeat=pb.Heartbeat())
            await bench.until(lambda beats=beats: len(heard) >= beats)
            timers.advance(0.2)
        await bench.until(bench.tasks["dead"].done)
        assert running.sites.link("alive")
        assert not running.sites.link("dead")
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

    pauses, is_over = [], asyncio.Event()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await is_over.wait()

    paused = SimpleNamespace(**vars(asyncio) | {"sleep": pause})
    monkeypatch.setattr("fedloom_server.runs.asyncio", paused)
    run = await bench.enqueue(spec(cohort={"min_sites": 1000}))
    await bench.until(lambda: "0 of 1000 fit" in bench.running.store.run(run.id).reason)
    monkeypatch.setattr(Sites, "connected", counted)
    with contextlib.ExitStack() as sessions:
        for number in range(500):
            about = Description(data_sets={"text": 1})
            sessions.enter_context(bench.running.sites.attached(f"s{number}", about, Mute()))
            await asyncio.sleep(0)
        assert looks <= 10
        is_over.set()
        await bench.until(lambda: "500 of 1000 fit" in bench.running.store.run(run.id).reason)
    assert 0 < looks <= 10 + 10 * len(pauses) < 250
    assert set(pauses) == {LOOK_S}


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
