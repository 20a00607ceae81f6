"""What operators decide about sites, by the contract, against a real coordinator."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from fedloom.v1 import runs_pb2, sites_pb2
from fedloom.v1 import session_pb2 as pb
from fedloom.v1.runs_pb2_grpc import RunServiceStub
from fedloom.v1.sites_pb2_grpc import SiteServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.errors import NotPermitted, StorageFull, StorageUnavailable
from fedloom_common.identity import Peer, Role
from fedloom_common.transfer import TransferStub, download
from fedloom_server import roster
from fedloom_server.app import coordinator
from fedloom_server.database import open_database
from fedloom_server.eligibility import Description
from fedloom_server.federationrecords import SiteRecord
from fedloom_server.records import Assignment, AssignmentState, Run, RunState, Work
from fedloom_server.store import MOST_ATTEMPTS, Store


class Operator:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = SiteServiceStub(channel)
        self.runs = RunServiceStub(channel)

    async def __call__(self, method: str, name: str, **more: object) -> runs_pb2.Site:
        return await getattr(self.stub, method)(getattr(sites_pb2, f"{method}SiteRequest")(name=name, **more))

    async def refused(self, method: str, name: str, **more: object) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self(method, name, **more)
        return caught.value.code(), caught.value.details()

    async def sites(self) -> dict[str, runs_pb2.Site]:
        answer = await self.runs.ListSites(runs_pb2.ListSitesRequest())
        return {site.name: site for site in answer.sites}


@pytest.fixture
async def operator(bench) -> AsyncIterator[Operator]:
    async with open_channel(f"127.0.0.1:{bench.running.port}", None, Peer(Role.OPERATOR, "ann")) as channel:
        yield Operator(channel)


async def attached(bench, *names):
    await bench.until(lambda: all(bench.running.sites.link(name) for name in names))


async def test_a_draining_site_finishes_what_it_has_and_gets_nothing_new(bench, spec, operator, clock, fault):
    bench.site("a")
    slow = bench.site("slow", fault=fault.REPEATS_ITSELF)
    await attached(bench, "a", "slow")
    cohort = {"min_sites": 1, "quorum": 1, "stall_s": 1}
    run = await bench.enqueue(spec(rounds=2, cohort=cohort, evaluation={"initial": False}))
    await bench.until(lambda: slow.repeated > 0)
    drained = await operator("Drain", "slow", reason="maintenance")
    assert (drained.state, drained.reason) == (runs_pb2.SITE_STATE_DRAINING, "maintenance")
    assert list(drained.open_assignments) == [f"{run.id}.1.1.train.slow"]
    await bench.until(lambda: bench.outcomes(run).get("a") == ("done", ""))
    clock.now_s += 1.1
    assert (await bench.ended(run)).state == "finished"
    assert bench.outcomes(run, 1)["slow"][0] == "lost"  # it was left to finish, and did not
    assert set(bench.outcomes(run, 2)) == {"a"}
    assert not (await operator("Get", "slow")).open_assignments
    assert (await operator("Undrain", "slow")).state == runs_pb2.SITE_STATE_ACTIVE


async def test_a_run_that_waits_goes_on_when_a_site_is_undrained(bench, spec, operator):
    bench.site("a")
    await attached(bench, "a")
    await operator("Drain", "a")
    run = await bench.enqueue(spec())
    await bench.until(lambda: "0 of 1 fit, 1 connected: 1 draining" in bench.running.store.run(run.id).reason)
    await operator("Undrain", "a")
    assert (await bench.ended(run)).state == "finished"


async def test_blocking_ends_the_session_and_its_assignments_at_once_and_says_why(
    bench, spec, operator, fault
):
    bench.site("good")
    bad = bench.site("bad", fault=fault.SILENT)
    await attached(bench, "good", "bad")
    run = await bench.enqueue(spec(cohort={"min_sites": 2, "quorum": 1, "stall_s": 100}))
    await bench.until(lambda: any(work.work == pb.WORK_TRAIN for work in bad.asked))
    await operator("Block", "bad", reason="its key was stolen")
    await asyncio.wait_for(bench.tasks["bad"], 60)
    assert bad.errors == ["site bad is blocked: its key was stolen"]
    assert (await bench.ended(run)).state == "finished"
    assert bench.outcomes(run)["bad"] == ("cancelled", "site bad is blocked: its key was stolen")


async def test_a_blocked_site_can_neither_attach_nor_read_until_it_is_unblocked(bench, spec, operator):
    bench.site("a")
    run = await bench.ended(await bench.enqueue(spec()))
    await operator("Block", "b", reason="unknown")  # it has never come
    site = bench.site("b")
    await asyncio.wait_for(bench.tasks["b"], 60)
    assert site.errors == ["site b is blocked: unknown"]
    async with open_channel(f"127.0.0.1:{bench.running.port}", None, Peer(Role.SITE, "b")) as channel:
        with pytest.raises(NotPermitted, match="site b is blocked: unknown"):
            await download(TransferStub(channel), run.model_digest, run.model_bytes, bench.folder / "stolen")
    assert (await operator("Unblock", "b")).state == runs_pb2.SITE_STATE_ACTIVE
    bench.attach(site)
    await attached(bench, "b")


async def test_a_run_taken_up_after_a_restart_does_not_wait_for_a_site_blocked_meanwhile(
    config, bench_of, spec, fault
):
    cohort = {"min_sites": 2, "quorum": 1, "stall_s": 100}
    async with coordinator(config) as running:
        bench = bench_of(running)
        bench.site("good", fault=fault.SILENT)
        bad = bench.site("bad", fault=fault.SILENT)
        run = await bench.enqueue(spec(cohort=cohort, evaluation={"initial": False}))
        await bench.until(lambda: bad.assigned.is_set())
    async with coordinator(config) as running:
        bench = bench_of(running)
        async with open_channel(f"127.0.0.1:{running.port}", None, Peer(Role.OPERATOR, "ann")) as channel:
            await Operator(channel)("Block", "bad")
        bench.site("good")
        assert (await bench.ended(run)).state == "finished"
        assert bench.outcomes(run)["bad"] == ("cancelled", "site bad is blocked: blocked by an operator")


async def test_a_round_taken_up_while_the_database_goes_away_is_taken_up_again_whole(
    config, bench_of, spec, fault, monkeypatch
):
    cohort = {"policy": "all", "min_sites": 2, "quorum": 1, "stall_s": 100}
    async with coordinator(config) as running:
        bench = bench_of(running)
        bench.site("good", fault=fault.SILENT)
        bad = bench.site("worse", fault=fault.SILENT)
        run = await bench.enqueue(spec(cohort=cohort, evaluation={"initial": False}))
        await bench.until(lambda: bad.assigned.is_set())
    with contextlib.closing(sqlite3.connect(config.state_dir / "coordinator.db")) as database, database:
        database.execute("UPDATE sites SET state = 'BLOCKED' WHERE name = 'worse'")
    failures = 0

    def save(store, *records):
        nonlocal failures
        if failures == 0 and any(getattr(record, "state", "") == "cancelled" for record in records):
            failures += 1
            raise StorageUnavailable("away")
        return saved(store, *records)

    saved = Store.save
    async with coordinator(config) as running:
        bench = bench_of(running)
        monkeypatch.setattr(Store, "save", save)
        bench.site("good")
        assert (await bench.ended(run)).state == "finished"
        assert {name: state for name, (state, _) in bench.outcomes(run).items()} == {
            "good": "done",
            "worse": "cancelled",
        }
    assert failures == 1


async def test_what_is_known_and_decided_of_sites_survives_a_restart(config, bench_of):
    async with coordinator(config) as running:
        bench = bench_of(running)
        for name in ("a", "b", "c"):
            bench.site(name)
        await attached(bench, "a", "b", "c")
        async with open_channel(f"127.0.0.1:{running.port}", None, Peer(Role.OPERATOR, "ann")) as channel:
            operator = Operator(channel)
            await operator("Drain", "b", reason="new disks")
            await operator("Block", "c")
            await operator("Label", "a", labels={"ward": "icu"})
            before = await operator.sites()
    async with (
        coordinator(config) as running,
        open_channel(f"127.0.0.1:{running.port}", None, Peer(Role.OPERATOR, "ann")) as channel,
    ):
        after = await Operator(channel).sites()
        refused = bench_of(running).site("c")
        await bench.until(lambda: bool(refused.errors))
    states = {name: (site.state, site.reason) for name, site in after.items()}
    assert states == {
        "a": (runs_pb2.SITE_STATE_ACTIVE, ""),
        "b": (runs_pb2.SITE_STATE_DRAINING, "new disks"),
        "c": (runs_pb2.SITE_STATE_BLOCKED, "blocked by an operator"),
    }
    assert not any(site.connected for site in after.values())
    assert after["a"].hello == before["a"].hello
    assert after["a"].hello.data_sets[0].name == "text"
    assert dict(after["a"].labels) == {"ward": "icu"}
    for name, site in after.items():
        assert 0 < site.first_heard_at_s == before[name].first_heard_at_s
        assert site.last_heard_at_s >= before[name].last_heard_at_s


async def test_forgetting_needs_an_absent_site_that_is_not_blocked(bench, spec, operator):
    bench.site("a")
    run = await bench.ended(await bench.enqueue(spec()))
    code, text = await operator.refused("Forget", "a")
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "is connected" in text
    await bench.detach("a")
    await bench.until(lambda: bench.running.sites.link("a") is None)
    await operator("Block", "a")
    assert "unblock it first" in (await operator.refused("Forget", "a"))[1]
    await operator("Unblock", "a")
    await operator("Forget", "a")
    assert await operator.sites() == {}
    assert bench.outcomes(run)["a"] == ("done", "")


async def test_a_site_that_was_forgotten_while_its_detaching_was_unwritten_stays_forgotten(
    bench, operator, monkeypatch
):
    monkeypatch.setattr(roster, "FLUSH_S", 0.2)
    bench.site("a")
    await attached(bench, "a")
    await bench.detach("a")
    await bench.until(lambda: bench.running.sites.link("a") is None)
    await operator("Forget", "a")
    await asyncio.sleep(0.5)
    assert bench.running.store.sites() == []


@pytest.mark.parametrize("method", ["Get", "Drain", "Undrain", "Unblock", "Forget", "Label"])
async def test_a_site_that_is_not_known_is_named(operator, method):
    assert await operator.refused(method, "kiel") == (
        grpc.StatusCode.NOT_FOUND,
        "there is no site 'kiel'; `fedloom sites list` names them",
    )


async def test_a_state_is_left_only_by_its_own_door(bench, operator):
    bench.site("a")
    await attached(bench, "a")
    assert "site a is active, not draining" in (await operator.refused("Undrain", "a"))[1]
    assert "site a is active, not blocked" in (await operator.refused("Unblock", "a"))[1]
    await operator("Block", "a")
    assert "blocked already" in (await operator.refused("Drain", "a"))[1]
    assert (await operator.refused("Block", "No Site"))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_operators_labels_stand_over_the_sites_own(bench, operator):
    site = bench.site("a")
    await attached(bench, "a")
    await bench.detach("a")
    site.labels = {"ward": "icu", "disk": "ssd", "bad name!": "x"}
    bench.attach(site)
    await bench.until(lambda: bench.running.sites.all()[0].labels == {"ward": "icu", "disk": "ssd"})
    labelled = await operator("Label", "a", labels={"ward": "er", "disk": ""})
    assert dict(labelled.labels) == {"ward": "er"}
    assert dict(labelled.hello.labels) == {"ward": "icu", "disk": "ssd"}
    assert dict(labelled.operator_labels) == {"ward": "er", "disk": ""}
    left = await operator("Label", "a", dropped=["ward"])
    assert dict(left.labels) == {"ward": "icu"}
    code, text = await operator.refused("Label", "a", labels={"ward": "in the north"})
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "'in the north' is no label's name or value" in text


async def test_a_run_asks_only_sites_that_have_its_labels(bench, spec, operator):
    for name in ("a", "b"):
        bench.site(name)
    await attached(bench, "a", "b")
    run = await bench.enqueue(spec(cohort={"require": {"label": "icu"}}))
    await bench.until(lambda: "2 lack label icu" in bench.running.store.run(run.id).reason)
    await operator("Label", "b", labels={"ward": "icu"})
    run = await bench.ended(run)
    assert run.state == "finished"
    assert {work.site for work in bench.running.store.assignments(run.id)} == {"b"}


async def test_round_robin_goes_on_where_it_was_after_a_restart(config, bench_of, spec):
    cohort = {"policy": "round_robin", "fraction": 0.3, "min_sites": 1}
    names = ["a", "b", "c"]
    trained = []
    async with coordinator(config) as running:
        bench = bench_of(running)
        for name in names:
            bench.site(name)
        await attached(bench, *names)
        run = await bench.enqueue(
            spec(rounds=5, cohort=cohort, evaluation={"every_rounds": 0, "initial": False})
        )
        await bench.until(lambda: running.store.run(run.id).rounds_done >= 2)
        await running.runs.pause(run.id, "until all are back")
    async with coordinator(config) as running:
        bench = bench_of(running)
        for name in names:
            bench.site(name)
        await attached(bench, *names)
        running.runs.resume(run.id)
        run = await bench.ended(run)
        trained = [record.cohort for record in running.store.rounds(run.id)]
    assert trained == [["a"], ["b"], ["c"], ["a"], ["b"]]


async def test_an_unknown_policy_is_refused_before_a_model_is_made(bench):
    async with open_channel(f"127.0.0.1:{bench.running.port}", None, Peer(Role.OPERATOR, "ann")) as channel:
        text = (
            "{name: x, model: {path: /nowhere}, data: text, rounds: 1, local: {steps: 1}, "
            "cohort: {policy: best}}"
        )
        with pytest.raises(
            grpc.aio.AioRpcError, match="no policy 'best'; the coordinator has all, round_robin"
        ):
            await RunServiceStub(channel).Submit(runs_pb2.SubmitRequest(spec=text))


async def test_every_decision_stands_in_the_audit_log(bench, operator):
    bench.site("a")
    await attached(bench, "a")
    await operator("Drain", "a", reason="new disks")
    await operator("Undrain", "a")
    await operator("Label", "a", labels={"ward": "icu"})
    await operator("Block", "a")
    await operator("Unblock", "a")
    await bench.detach("a")
    await operator("Forget", "a")
    entries = [entry for entry in bench.running.store.audit_log.entries() if entry.action.startswith("site.")]
    assert {(entry.actor, entry.subject) for entry in entries} == {("operator ann", "a")}
    actions = [entry.action.removeprefix("site.") for entry in entries]
    assert actions == ["drain", "undrain", "label", "block", "unblock", "forget"]
    assert "new disks" in entries[0].details


async def test_sites_that_the_database_does_not_take_are_written_when_it_does(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(roster, "FLUSH_S", 0.05)
    store = Store(tmp_path)
    known = roster.Roster(store)
    save, failures = Store.save, 3

    def full(store: Store, *records: SiteRecord) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise StorageFull("no space left for the database")
        save(store, *records)

    monkeypatch.setattr(Store, "save", full)
    known.introduced(known.add("a"), Description(software="fedloom 9"), {"ward": "icu"})
    async with asyncio.timeout(60):
        while not store.sites():  # noqa: ASYNC110 (a timer of the roster's own)
            await asyncio.sleep(0.02)
    assert [
        record.reason for record in caplog.records if record.message == "sites have yet to be written"
    ] == ["no space left for the database"] * 3
    (site,) = roster.Roster(store)
    assert (site.labels, site.description.software) == ({"ward": "icu"}, "fedloom 9")
    store.close()


@pytest.fixture
def store(tmp_path, database_url) -> Iterator[Store]:
    store = Store(tmp_path, open_database(database_url, tmp_path))
    yield store
    store.close()


def test_history_is_that_of_earlier_attempts_whatever_the_database(store):
    def training(
        number: int, attempt: int, site: str, state: str, examples: int, work: str = "train"
    ) -> Assignment:
        return Assignment(
            id=f"r.{number}.{attempt}.{work}.{site}", run_id="r", round=number, attempt=attempt,
            work=Work(work), site=site, model_digest="", model_bytes=0, state=AssignmentState(state),
            examples=examples,
        )  # fmt: skip

    run = Run(
        id="r", name="r", spec_json="{}", state=RunState.RUNNING, submitted_at_s=0.0, assets=[],
        model_digest="", model_bytes=0,
    )  # fmt: skip
    store.save(
        run,
        training(1, 1, "a", "done", 10),
        training(1, 2, "b", "lost", 99),
        training(2, 1, "a", "failed", 50),
        training(2, 1, "c", "done", 7, work="evaluate"),
        training(2, 2, "b", "done", 20),
    )
    history = {site: (when, examples) for site, when, examples in store.training_history("r", (2, 2))}
    assert history == {"a": (2 * MOST_ATTEMPTS + 1, 10), "b": (MOST_ATTEMPTS + 2, 0)}
    assert store.training_history("r", (1, 1)) == []
    for _ in range(2):
        store.save(SiteRecord(name="a"), SiteRecord(name="b", own_labels={"ward": "icu"}))
    assert sorted(site.name for site in store.sites()) == ["a", "b"]
    store.remove_site("a")
    assert [(site.name, site.own_labels) for site in store.sites()] == [("b", {"ward": "icu"})]
