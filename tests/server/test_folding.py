"""Updates are folded while others arrive: what lies on disk stays bounded, and a crash loses none."""

import os

import numpy as np
import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom_common.errors import StorageFull
from fedloom_server.app import coordinator
from fedloom_server.store import Store
from fedloom_server.turns import UploadTurns


def spooled(bench) -> list[str]:
    return sorted(path.suffix for path in bench.running.store.spool.folder.iterdir())


@pytest.mark.parametrize("staged", [1, 2, 8])
@pytest.mark.parametrize("deterministic", [False, True])
async def test_the_mean_is_the_same_however_many_updates_may_lie_on_disk(
    config, spec, bench_of, initial, staged, deterministic
):
    async with coordinator(config.model_copy(update={"staged_updates": staged})) as running:
        bench = bench_of(running)
        for number in range(6):
            bench.site(f"site-{number}", step=float(number), examples=number + 1)
        run = await bench.ended(
            await bench.enqueue(
                spec(cohort={"min_sites": 6}, aggregation={"deterministic": deterministic}, rounds=2)
            )
        )
        assert run.state == "finished"
        mean = sum(number * (number + 1) for number in range(6)) / 21
        np.testing.assert_allclose(
            bench.model(run)["layer.bias"], initial["layer.bias"] + 2 * mean, rtol=1e-6
        )
        assert spooled(bench) == []


async def test_what_is_folded_leaves_the_disk_while_a_site_is_still_awaited(config, spec, bench_of, fault):
    async with coordinator(config.model_copy(update={"staged_updates": 2})) as running:
        bench = bench_of(running)
        for number in range(5):
            bench.site(f"site-{number}")
        slow = bench.site("slow", fault=fault.SILENT)
        run = await bench.enqueue(spec(cohort={"min_sites": 6}, evaluation={"initial": False}))
        await bench.until(lambda: spooled(bench) == [".sum"] and len(fold_of(bench, run)) == 5)
        assert slow.assigned.is_set()
        assert all(outcome == ("done", "") for site, outcome in bench.outcomes(run).items() if site != "slow")
        await bench.running.runs.stop(run.id, "enough")


def announced(bench, run) -> list[str]:
    """Who has an update ready."""
    return sorted(a.site for a in bench.running.store.assignments(run.id, 1) if a.update_digest)


async def test_a_deterministic_round_lets_the_site_that_all_wait_for_go_first(
    config, spec, bench_of, clock, fault
):
    async with coordinator(config.model_copy(update={"staged_updates": 1})) as running:
        bench = bench_of(running)
        first = bench.site("a", fault=fault.SILENT)
        for name in "bcd":
            bench.site(name)
        cohort = {"min_sites": 4, "quorum": 3, "stall_s": 0.2}
        run = await bench.enqueue(
            spec(cohort=cohort, aggregation={"deterministic": True}, evaluation={"initial": False})
        )
        await bench.until(lambda: first.assigned.is_set() and announced(bench, run) == ["b", "c", "d"])
        await bench.until(lambda: ("done", "") in bench.outcomes(run).values())  # the others find no room
        clock.now_s += 0.21
        assert (await bench.ended(run)).state == "finished"
        assert bench.outcomes(run)["a"][0] == "lost"
        assert {bench.outcomes(run)[name][0] for name in "bcd"} == {"done"}


async def test_a_deterministic_round_gives_the_same_bytes_in_whatever_order_updates_arrive(
    config, tmp_path, spec, bench_of
):
    digests = set()
    for number, order in enumerate(("abcdef", "fedcba")):
        folder = tmp_path / str(number)
        async with coordinator(
            config.model_copy(update={"state_dir": folder, "staged_updates": 2, "concurrent_uploads": 1})
        ) as running:
            bench = bench_of(running)
            for name in order:
                bench.site(name, step=1 / (3 + ord(name)), examples=ord(name))
                await bench.until(lambda bench=bench, name=name: bench.running.sites.link(name) is not None)
            run = await bench.ended(
                await bench.enqueue(spec(cohort={"min_sites": 6}, aggregation={"deterministic": True}))
            )
            digests.add(run.model_digest)
    assert len(digests) == 1


ROBUST = [
    "median",
    {"name": "trimmed_mean", "byzantine": 2},
    {"name": "krum", "byzantine": 2},
    {"name": "multi_krum", "byzantine": 2},
    "geometric_median",
]


@pytest.mark.parametrize("rule", ROBUST, ids=str)
async def test_a_rule_that_takes_all_updates_at_once_has_them_all_whatever_may_be_staged(
    config, spec, bench_of, initial, rule
):
    async with coordinator(config.model_copy(update={"staged_updates": 2})) as running:
        bench = bench_of(running)
        for number in range(7):
            bench.site(f"site-{number}", step=1.0 if number < 5 else 1e6)
        run = await bench.ended(
            await bench.enqueue(spec(cohort={"min_sites": 7}, aggregation={"rule": rule}, rounds=2))
        )
        assert run.state == "finished", run.reason
        np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 2, rtol=1e-5)
        assert all(outcome == ("done", "") for outcome in bench.outcomes(run, 2).values())
        assert not any(a.is_folded for a in running.store.assignments(run.id))
        assert spooled(bench) == []


async def test_updates_that_wait_for_one_another_leave_room_for_those_of_other_runs(
    config, spec, bench_of, fault
):
    async with coordinator(config.model_copy(update={"staged_updates": 2})) as running:
        bench = bench_of(running)
        for number in range(4):
            bench.site(f"site-{number}")
        slow = bench.site("slow", fault=fault.SILENT)
        robust = await bench.enqueue(
            spec(name="robust", cohort={"min_sites": 5}, aggregation={"rule": "median"})
        )
        await bench.until(lambda: list(bench.outcomes(robust).values()).count(("done", "")) == 4)
        cohort = {"min_sites": 4, "require": {"label": "quick"}}
        for number in range(4):
            bench.sites[f"site-{number}"].labels = {"quick": "yes"}
            await bench.detach(f"site-{number}")
            bench.attach(bench.sites[f"site-{number}"])
        mean = await bench.ended(await bench.enqueue(spec(name="mean", cohort=cohort)))
        assert mean.state == "finished"
        assert running.store.run(robust.id).state == "running"
        assert slow.assigned.is_set()
        await running.runs.stop(robust.id, "enough")


async def test_a_robust_rule_gives_the_same_bytes_in_whatever_order_updates_arrive(
    config, tmp_path, spec, bench_of
):
    digests = set()
    for number, order in enumerate(("abcdef", "fedcba")):
        folder = tmp_path / str(number)
        one_by_one = {"state_dir": folder, "concurrent_uploads": 1}
        async with coordinator(config.model_copy(update=one_by_one)) as running:
            bench = bench_of(running)
            for name in order:
                bench.site(name, step=1 / (3 + ord(name)), examples=ord(name))
                await bench.until(lambda bench=bench, name=name: bench.running.sites.link(name) is not None)
            run = await bench.ended(
                await bench.enqueue(spec(cohort={"min_sites": 6}, aggregation={"rule": "geometric_median"}))
            )
            digests.add(run.model_digest)
    assert len(digests) == 1


async def test_updates_that_were_folded_count_after_a_restart(config, spec, bench_of, initial, fault):
    small = config.model_copy(update={"staged_updates": 2})
    async with coordinator(small) as running:
        bench = bench_of(running)
        for number in range(3):
            bench.site(f"site-{number}", step=3.0)
        bench.site("slow", step=7.0, fault=fault.SILENT)
        run = await bench.enqueue(spec(cohort={"min_sites": 4}, evaluation={"initial": False}))
        await bench.until(lambda: len(fold_of(bench, run)) == 3)
        trained = [len(site.trained) for site in bench.sites.values()]
    async with coordinator(small) as running:
        await all_come_back(bench, running, fault)
        run = await bench.ended(run)
        assert run.state == "finished"
        np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 4, rtol=1e-6)
        assert trained == [1, 1, 1, 0]
        assert [len(site.trained) for site in bench.sites.values()] == [1, 1, 1, 1]


@pytest.mark.parametrize("what", ["update", "sum"])
async def test_what_a_power_cut_has_spoilt_is_asked_for_again(config, spec, bench_of, initial, fault, what):
    small = config.model_copy(update={"staged_updates": 2 if what == "sum" else 8})
    async with coordinator(small) as running:
        bench = bench_of(running)
        for number in range(2):
            bench.site(f"site-{number}", step=3.0)
        bench.site("slow", step=6.0, fault=fault.SILENT)
        run = await bench.enqueue(spec(cohort={"min_sites": 3}, evaluation={"initial": False}))
        await bench.until(lambda: list(bench.outcomes(run).values()).count(("done", "")) == 2)
        if what == "sum":
            await bench.until(lambda: len(fold_of(bench, run)) == 2)
    for path in running.store.spool.folder.iterdir():
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
    async with coordinator(small) as running:
        await all_come_back(bench, running, fault)
        run = await bench.ended(run)
        assert run.state == "finished"
        np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 4, rtol=1e-6)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()], ids=repr)
async def test_a_fold_that_finds_no_room_leaves_the_updates_to_the_end_of_the_round(
    config, spec, bench_of, initial, monkeypatch, error
):
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fedloom_server.aggregation.mean.WeightedMean.fold", full)
    async with coordinator(config.model_copy(update={"staged_updates": 1})) as running:
        bench = bench_of(running)
        for number in range(3):
            bench.site(f"site-{number}", step=2.0)
        run = await bench.ended(await bench.enqueue(spec(cohort={"min_sites": 3})))
        assert run.state == "finished"
        np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 2, rtol=1e-6)


async def test_a_fold_that_breaks_off_keeps_no_site_waiting(config, spec, bench_of, monkeypatch):
    def locked(*_: object, **__: object) -> None:
        raise RuntimeError("database is locked")

    monkeypatch.setattr("fedloom_server.aggregation.mean.WeightedMean.fold", locked)
    async with coordinator(config.model_copy(update={"staged_updates": 1})) as running:
        bench = bench_of(running)
        for number in range(3):
            bench.site(f"site-{number}")
        run = await bench.ended(await bench.enqueue(spec(cohort={"min_sites": 3})))
        assert run.state == "failed"
        assert "database is locked" in run.reason


async def test_updates_of_a_failed_attempt_leave_the_disk(config, spec, bench_of, fault):
    async with coordinator(config) as running:
        bench = bench_of(running)
        good, bad = bench.site("good"), bench.site("bad", fault=fault.SILENT)
        cohort = {"min_sites": 2, "attempts": 2}
        run = await bench.enqueue(spec(cohort=cohort, evaluation={"initial": False}))
        await bench.until(lambda: good.receipts and bad.asked)
        assert len(spooled(bench)) == 1
        good.fault = fault.SILENT
        bad.send(failure=pb.Failure(assignment_id=f"{run.id}.1.1.train.bad", reason="out of memory"))
        await bench.until(lambda: len(good.asked) == 2)
        assert spooled(bench) == []


async def test_a_fold_that_the_database_has_no_room_for_counts_no_update_twice(
    config, spec, bench_of, initial, fault, monkeypatch
):
    def full(*_: object, **__: object) -> None:
        raise StorageFull("no space left")

    def save(self: Store, *records: object) -> None:
        keep(self, *records) if not any(getattr(record, "is_folded", False) for record in records) else full()

    keep = Store.save
    async with coordinator(config.model_copy(update={"staged_updates": 2})) as running:
        bench = bench_of(running)
        for number in range(2):
            bench.site(f"site-{number}", step=3.0)
        slow = bench.site("slow", step=9.0, fault=fault.SILENT)
        with monkeypatch.context() as patched:
            patched.setattr(Store, "save", save)
            patched.setattr("fedloom_server.aggregation.mean.WeightedMean.aggregate", full)
            run = await bench.enqueue(spec(cohort={"min_sites": 3}, evaluation={"initial": False}))
            await bench.until(lambda: list(running.store.spool.folder.glob("*.sum")))
            await bench.until(lambda: list(bench.outcomes(run).values()).count(("done", "")) == 2)
            await bench.detach("slow")
            slow.fault = fault.NONE
            bench.attach(slow)
            assert "no space left" in (await bench.waits(run, "goes on when")).reason
        running.runs.resume(run.id)
        assert (await bench.ended(run)).state == "finished"
        np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 5, rtol=1e-6)


async def all_come_back(bench, running, fault) -> None:
    """Every site attaches to a coordinator that was started again, and has no fault any more."""
    bench.running = running
    for site in list(bench.sites.values()):
        await bench.detach(site.name)
        site.fault = fault.NONE
        bench.attach(site)


def fold_of(bench, run) -> list[str]:
    return [a.site for a in bench.running.store.assignments(run.id, 1) if a.is_folded]


class Turns:
    """Turns that note what is granted."""

    def __init__(self, concurrent: int, staged: int, first: str = "") -> None:
        self.granted: list[str] = []
        self.turns = UploadTurns(
            concurrent_uploads=concurrent,
            staged_updates=staged,
            on_turn=lambda name: self.granted.append(name) or True,
            is_next=lambda name: name == first,
            on_stuck=lambda: None,
        )


def test_no_more_updates_arrive_than_may_lie_on_disk():
    at = Turns(concurrent=4, staged=3)
    for name in "abcde":
        at.turns.ask(name)
    assert at.granted == ["a", "b", "c"]
    at.turns.stage("a")
    assert at.granted == ["a", "b", "c"]
    at.turns.release("a")
    assert at.granted == ["a", "b", "c", "d"]
    at.turns.leave("b")
    assert at.granted == ["a", "b", "c", "d", "e"]


def test_an_update_that_the_staged_ones_wait_for_may_arrive_beyond_their_number():
    at = Turns(concurrent=2, staged=2, first="z")
    for name in "ab":
        at.turns.ask(name)
        at.turns.stage(name)
    at.turns.ask("c")
    at.turns.ask("z")
    assert at.granted == ["a", "b", "z"]
