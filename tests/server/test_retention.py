"""Which models are kept."""

import asyncio
import os
import threading
import time

import pytest

from fedloom_common.digests import digest_of_file
from fedloom_common.errors import BadSpec, NotFound
from fedloom_common.settings import load_settings
from fedloom_server.adapters.parts import PartFile, Parts
from fedloom_server.app import coordinator
from fedloom_server.config import CoordinatorConfig, KeepModels
from fedloom_server.database import open_database
from fedloom_server.exports import export
from fedloom_server.records import Round, RoundState, Run, RunState
from fedloom_server.references import FEW_FILES, part_digests_of, parts_among
from fedloom_server.retention import kept_rounds
from fedloom_server.store import Store
from fedloom_server.submissions import Submissions

LOSSES = {0: 9.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 2.5, 5: 2.5, 6: 7.0}
METRICS = {number: {"loss": loss, "accuracy": loss / 10} for number, loss in LOSSES.items()}


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        pytest.param({"last": 2, "best": 0}, {5, 6}, id="last"),
        pytest.param({"last": 1, "best": 2}, {6, 4, 5}, id="best-by-loss"),
        pytest.param({"last": 1, "best": 1}, {6, 4}, id="the-earlier-of-equals"),
        pytest.param({"last": 1, "best": 0, "every": 3}, {6, 3}, id="every-third"),
        pytest.param({"last": 100, "best": 100}, set(range(7)), id="more-than-there-are"),
    ],
)
def test_the_policy_keeps(spec, policy, wanted):
    assert kept_rounds(spec(), METRICS, KeepModels(**policy)) == wanted


def test_the_best_are_best_by_the_metric_that_stops_the_run(spec):
    stop = {"target": {"metric": "accuracy", "value": 0.99, "higher_is_better": True}}
    assert kept_rounds(spec(stop=stop), METRICS, KeepModels(last=1, best=2)) == {6, 0}
    stop = {"patience": {"metric": "accuracy", "evaluations": 3}}
    assert kept_rounds(spec(stop=stop), METRICS, KeepModels(last=1, best=1)) == {6, 0}


def test_rounds_that_nobody_measured_are_not_the_best(spec):
    metrics = {1: {"train_loss": 0.1}, 2: {"loss": 2.0}, 3: {"loss": float("inf")}, 4: {}, 5: {}}
    assert kept_rounds(spec(), metrics, KeepModels(last=1, best=5)) == {2, 5}


def test_a_plain_number_is_the_newest_so_many(tmp_path, monkeypatch):
    def keep(*flags: str) -> KeepModels:
        always = ("--insecure", "--state-dir", str(tmp_path))
        return load_settings(
            CoordinatorConfig, None, env_prefix="FEDTEST_", flags=(*always, *flags)
        ).keep_models

    assert keep() == KeepModels(last=5, best=1, every=0)
    assert keep("--keep-models", "3") == KeepModels(last=3, best=0, every=0)
    assert keep("--keep-models.every", "10") == KeepModels(last=5, best=1, every=10)
    monkeypatch.setenv("FEDTEST_KEEP_MODELS", '{"last": 2, "best": 4}')
    assert keep() == KeepModels(last=2, best=4, every=0)
    with pytest.raises(BadSpec, match=r"keep_models\.last"):
        keep("--keep-models", "0")


async def test_the_best_and_the_newest_models_are_kept_and_export_says_which(config, bench_of, spec):
    keep = KeepModels(last=1, best=1, every=2)
    async with coordinator(config.model_copy(update={"keep_models": keep})) as running:
        bench = bench_of(running)
        bench.site("a", step=-1.0)  # the loss is 10 - mean: the initial model is the best
        run = await bench.ended(await bench.enqueue(spec(rounds=5)))
        store = running.store
        kept = [record.number for record in store.rounds(run.id) if store.files.has(record.model_digest)]
        assert kept == [0, 2, 4, 5]
        assert export(store, run.id, 2).files[0]["digest"] == store.rounds(run.id)[2].model_digest
        with pytest.raises(NotFound, match=r"no longer keeps the model of round 3; .* those of 0, 2, 4, 5 "):
            export(store, run.id, 3)
        clone_from = running.runs.submissions.clone_from_model
        assert (await clone_from(run.id, spec(rounds=1).model_dump_json(), 2)).cloned_round == 2
        with pytest.raises(NotFound, match=r"no longer keeps the model of round 3; .* those of 0, 2, 4, 5 "):
            await clone_from(run.id, spec(rounds=1).model_dump_json(), 3)


async def test_an_initial_model_that_nobody_measured_is_removed_in_its_turn(config, bench_of, spec):
    keep = KeepModels(last=2, best=0)
    async with coordinator(config.model_copy(update={"keep_models": keep})) as running:
        bench = bench_of(running)
        bench.site("a")
        run = await bench.enqueue(spec(rounds=3, evaluation={"initial": False}))
        initial = run.model_digest
        assert running.store.files.has(initial)
        await bench.ended(run)
        assert not running.store.files.has(initial)


async def test_a_model_that_another_run_begins_with_stays(config, bench_of, spec):
    keep = KeepModels(last=1, best=0)
    async with coordinator(config.model_copy(update={"keep_models": keep})) as running:
        bench = bench_of(running)
        first, second = [await bench.enqueue(spec(rounds=3)) for _ in range(2)]
        assert first.model_digest == second.model_digest
        bench.site("a")
        assert (await bench.ended(first)).state == "finished"
        assert (await bench.ended(second)).state == "finished"


def part(number):
    return PartFile(name="factors.safetensors", digest=f"blake3:{number:064x}", size_bytes=1)


@pytest.mark.parametrize("asked_for", [2, 2 * FEW_FILES])
def test_files_that_another_run_s_models_need_are_found_without_reading_all_of_its_rounds(
    tmp_path, spec, database_url, monkeypatch, asked_for
):
    store = Store(tmp_path, open_database(database_url, tmp_path))
    for name in ("mine", "other"):
        run = Run(
            id=name, name=name, spec_json=spec().model_dump_json(), state=RunState.RUNNING,
            submitted_at_s=0.0, assets=[], model_digest="", model_bytes=0,
            adapter=Parts(frozen=(part(1),)).to_json(),
        )  # fmt: skip
        rounds = [
            Round(
                run_id=name, number=number, state=RoundState.FINISHED, base_digest="", started_at_s=0.0,
                model_digest=f"{name} {number}",
                adapter=Parts(frozen=(part(1),), folds=(part(1000 * len(name) + number),)).to_json(),
            )
            for number in range(1, 51)
        ]  # fmt: skip
        store.save(run, *rounds)
    read, from_json = [], Parts.from_json
    monkeypatch.setattr(Parts, "from_json", lambda content: read.append(content) or from_json(content))
    in_question = {part(number).digest for number in (4007, 5007, *range(9000, 9000 + asked_for - 2))}
    assert parts_among(store.database, in_question, besides="mine") == {part(5007).digest}
    assert len(read) == (1 + 1 if asked_for <= FEW_FILES else 1 + 50)
    read.clear()
    wanted = {part(number).digest for number in (1, 4007)}
    assert part_digests_of(store.database, {"mine 7"}) == wanted
    assert len(read) == 2 + 1
    store.close()


@pytest.mark.parametrize("goes_on_from", [None, 0])
async def test_a_model_that_a_run_is_about_to_begin_with_outlives_the_rounds_of_another(
    config, bench_of, spec, monkeypatch, goes_on_from
):
    before_saved, goes_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold_up(step):
        def held_up(*arguments):
            result = step(*arguments)
            loop.call_soon_threadsafe(before_saved.set)
            goes_on.wait(60)
            return result

        return held_up

    keep = KeepModels(last=1, best=0)
    async with coordinator(config.model_copy(update={"keep_models": keep})) as running:
        bench, submissions = bench_of(running), running.runs.submissions
        first = await bench.enqueue(spec(rounds=3))
        site = bench.site("a")
        site.gate = asyncio.Semaphore(0)
        await bench.until(lambda: running.store.unfinished_rounds(first.id) and site.asked)
        monkeypatch.setattr(Submissions, "_rank", hold_up(Submissions._rank))
        monkeypatch.setattr(Submissions, "_fitted", hold_up(Submissions._fitted))
        if goes_on_from is None:
            submitting = asyncio.create_task(bench.enqueue(spec(rounds=1)))
        else:
            text = spec(rounds=1).model_dump_json()
            submitting = asyncio.create_task(submissions.clone_from_model(first.id, text, goes_on_from))
        await before_saved.wait()
        for _ in range(4):
            site.gate.release()
        assert (await bench.ended(first)).state == "finished"
        goes_on.set()
        second = await submitting
        assert second.model_digest == first.model_digest
        assert (await bench.ended(second)).state == "finished"


async def test_a_stopped_run_that_is_to_train_alone_at_its_end_keeps_where_that_begins(
    config, bench_of, spec
):
    config = config.model_copy(update={"keep_models": KeepModels(last=1, best=0)})
    async with coordinator(config) as running:
        bench = bench_of(running)
        site = bench.site("a")
        run = await bench.enqueue(spec(rounds=4, evaluation={"alone": True}))
        await bench.until(lambda: running.store.run(run.id).rounds_done >= 2)
        await running.runs.stop(run.id, "")
        await bench.detach("a")
        kept = {file.digest for file in running.store.files.all()}
    for digest in kept:
        os.utime(config.state_dir / "files" / digest.replace(":", "-"), (1, 1))
    async with coordinator(config) as running:
        bench = bench_of(running)
        bench.attach(site)
        running.runs.resume(run.id)
        assert (await bench.ended(run)).state == "finished"


async def test_what_a_kill_left_unnamed_is_removed_at_the_start_after_a_grace(config, bench_of, spec):
    async with coordinator(config) as running:
        bench = bench_of(running)
        bench.site("a")
        run = await bench.ended(await bench.enqueue(spec(rounds=2)))
        kept = {file.digest for file in running.store.files.all()}
    orphans = [unnamed(config, b"old", 7200), unnamed(config, b"new", 60)]
    for digest in kept:
        os.utime(config.state_dir / "files" / digest.replace(":", "-"), (1, 1))
    async with coordinator(config) as running:
        assert {file.digest for file in running.store.files.all()} == kept | {orphans[1]}
        assert export(running.store, run.id, 0).files


async def test_with_an_empty_database_no_file_is_removed(config):
    async with coordinator(config):
        pass
    orphan = unnamed(config, b"of the database that was left behind", 1e6)
    async with coordinator(config) as running:
        assert running.store.files.has(orphan)


def unnamed(config, content: bytes, age_s: float) -> str:
    path = config.state_dir / "files" / "new"
    path.write_bytes(content)
    written_at_s = time.time() - age_s
    os.utime(path, (written_at_s, written_at_s))
    digest = digest_of_file(path)
    path.rename(path.with_name(digest.replace(":", "-")))
    return digest
