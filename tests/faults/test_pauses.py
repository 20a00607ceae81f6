"""Claims about processes that stand still, and lines that carry nothing while they look well."""

import asyncio
import signal

import pytest
from faults.federation import Federation, federation_of
from faults.ledger import assert_every_site_counted_once, assert_mean_of_what_counted
from faults.nullsite import Tensors
from faults.proxy import Proxy

EXAMPLES = {"bergen": 3, "oslo": 5}
HEARTBEAT_S = 1


async def begun(federation: Federation, *, rounds: int = 3, **cohort: object) -> tuple[str, Tensors]:
    """A run whose first round is under way at both sites, and its initial model."""
    federation.configure("coordinator", heartbeat_s=HEARTBEAT_S)
    federation.start_coordinator()
    run = await federation.submit(rounds=rounds, cohort={"min_sites": 2, "stall_s": 60} | cohort)
    answer = await federation.get(run)
    assert answer is not None
    initial = federation.model(answer.run.model.digest)
    for site, examples in EXAMPLES.items():
        federation.train(site, examples=examples, seconds=2.0)
        federation.start_site(site)
    await federation.until(lambda: all("work begins" in federation.log(site) for site in EXAMPLES))
    return run, initial


@pytest.mark.faults(
    injected="SIGSTOP of the coordinator for 12 s in the middle of a round, then SIGCONT",
    must="sites train on meanwhile and deliver afterwards; every training counts once",
)
async def test_a_coordinator_that_stands_still_loses_nothing(tmp_path, seen):
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        run, initial = await begun(federation)
        federation.running["coordinator"].send_signal(signal.SIGSTOP)
        await asyncio.sleep(12)
        federation.running["coordinator"].send_signal(signal.SIGCONT)
        answer = await federation.finished(run, 60)
        assert_every_site_counted_once(federation, answer, EXAMPLES)
        assert_mean_of_what_counted(initial, answer, federation.model(answer.run.model.digest))
    seen("3 rounds, each update once")


@pytest.mark.faults(
    injected="SIGSTOP of a site for 12 s, four times the silence that ends its session, then SIGCONT",
    must="the coordinator notes it within three heartbeats; the site attaches again and its training counts",
)
async def test_a_site_that_stands_still_is_noticed_and_goes_on(tmp_path, seen):
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        run, initial = await begun(federation)
        federation.running["oslo"].send_signal(signal.SIGSTOP)
        await asyncio.sleep(12)
        assert "site=oslo silence_s=3" in federation.log("coordinator")
        federation.running["oslo"].send_signal(signal.SIGCONT)
        answer = await federation.finished(run, 60)
        assert_every_site_counted_once(federation, answer, EXAMPLES)
        assert_mean_of_what_counted(initial, answer, federation.model(answer.run.model.digest))
    seen("silent after 3 s; 3 rounds, each update once")


@pytest.mark.faults(
    injected="SIGSTOP of a site that never comes back",
    must="its assignment is lost after `stall_s`, by name and reason; the round ends with the quorum",
)
async def test_a_site_that_never_comes_back_is_lost_by_name(tmp_path, seen):
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        run, initial = await begun(federation, rounds=1, stall_s=6, quorum=1)
        federation.running["oslo"].send_signal(signal.SIGSTOP)
        answer = await federation.finished(run, 60)
        (lost,) = (told for told in answer.rounds[0].sites if told.site == "oslo")
        assert lost.state == "lost"
        assert "no progress for 6 s" in lost.reason
        assert "not connected" in lost.reason
        assert_mean_of_what_counted(initial, answer, federation.model(answer.run.model.digest))
    seen(f"round 1 took {answer.rounds[0].ended_at_s - answer.rounds[0].started_at_s:.0f} s")


@pytest.mark.faults(
    injected="a half-open connection: the line swallows both ways while a site trains, and tells nobody",
    must="the coordinator ends the session after three heartbeats; keepalive ends it at the site, which "
    "attaches again and delivers; every training counts once",
)
async def test_a_half_open_connection_is_given_up_at_both_ends(tmp_path, seen):
    async with federation_of(tmp_path, *EXAMPLES) as federation, Proxy(federation.port) as proxy:
        federation.ports["oslo"] = proxy.port
        run, initial = await begun(federation, stall_s=200)
        proxy.swallow()
        answer = await federation.finished(run, 200)
        assert "site=oslo silence_s=3" in federation.log("coordinator")
        assert_every_site_counted_once(federation, answer, EXAMPLES)
        assert_mean_of_what_counted(initial, answer, federation.model(answer.run.model.digest))
    seen(f"round 1 took {answer.rounds[0].ended_at_s - answer.rounds[0].started_at_s:.0f} s")
