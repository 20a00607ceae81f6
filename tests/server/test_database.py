"""A database that is another process: it may be held by others, restart, or be away."""

import asyncio
import gc
import logging
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import postgresql
import pytest
from pydantic import SecretStr
from sqlalchemy import event

from fedloom.v1 import session_pb2 as pb
from fedloom_common.errors import BadSpec, StorageUnavailable, WrongState
from fedloom_server import app, ownership
from fedloom_server.app import coordinator
from fedloom_server.config import CoordinatorConfig
from fedloom_server.database import open_database, parse_url
from fedloom_server.ownership import owned_store


@pytest.fixture
def url(postgres: postgresql.Server) -> str:
    return postgres.new_database()


@pytest.fixture
def restartable() -> Iterator[postgresql.Server]:
    """A server that no other test uses."""
    with postgresql.server() as server:
        yield server


def on(config: CoordinatorConfig, url: str, state_dir: str = "state") -> CoordinatorConfig:
    folder = config.state_dir.with_name(state_dir)
    return config.model_copy(update={"database": SecretStr(url), "state_dir": folder})


async def test_a_run_on_postgresql_gives_the_model_of_one_on_sqlite(config, url, bench_of, spec, initial):
    async with coordinator(on(config, url)) as running:
        bench = bench_of(running)
        bench.site("a", step=1.0, examples=10)
        bench.site("b", step=4.0, examples=20)
        run = await bench.ended(await bench.enqueue(spec(rounds=3, cohort={"min_sites": 2, "stall_s": 60})))
        assert (run.state, run.rounds_done) == ("finished", 3)
        for name, tensor in bench.model(run).items():
            np.testing.assert_allclose(tensor, initial[name] + 3 * 3.0, rtol=1e-6)
        assert not list(running.store.spool.folder.iterdir())


async def test_a_second_coordinator_is_refused_on_one_database(config, url, monkeypatch):
    monkeypatch.setattr(ownership, "TAKE_LOCK_S", 0.5)
    async with coordinator(on(config, url)):
        with pytest.raises(WrongState, match="another coordinator uses the database"):
            async with coordinator(on(config, url, "other")):
                pass
    async with coordinator(on(config, url, "other")):
        pass


def test_a_coordinator_whose_lock_was_lost_writes_no_more_once_another_has_begun(tmp_path, url, postgres):
    with owned_store(tmp_path / "first", url) as (store, hold):
        store.audit_log.audit("somebody", "before")
        postgres.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        )
        store.audit_log.audit("somebody", "still.ours")
        with owned_store(tmp_path / "second", url) as (other, _):
            with pytest.raises(StorageUnavailable, match="another coordinator has taken the database over"):
                store.audit_log.audit("somebody", "too.late")
            assert [entry.action for entry in other.audit_log.entries()] == ["before", "still.ours"]
            hold.check()  # sees that the connection is gone
            with pytest.raises(WrongState, match="this one stops"):
                hold.check()


def test_a_lock_that_a_restart_took_is_taken_again(tmp_path, restartable, monkeypatch):
    url = restartable.new_database()
    monkeypatch.setattr(ownership, "TAKE_LOCK_S", 0.5)
    with owned_store(tmp_path / "first", url) as (store, hold):
        restartable.stop()
        hold.check()
        hold.check()
        with pytest.raises(StorageUnavailable):
            store.runs()
        restartable.start()
        until(lambda: hold.check() or (hold.is_held and answers(store)))
        with pytest.raises(WrongState), owned_store(tmp_path / "second", url):
            pass


async def test_a_run_survives_a_database_that_crashes_in_the_middle(
    config, restartable, bench_of, spec, initial, monkeypatch
):
    monkeypatch.setattr(app, "BROKEN_QUEUE_S", 0.5)
    async with coordinator(on(config, restartable.new_database())) as running:
        bench = bench_of(running)
        for name, step in (("a", 1.0), ("b", 3.0)):
            bench.site(name, step=step)
        returning = asyncio.create_task(come_back(bench))
        run = await bench.enqueue(spec(rounds=12, cohort={"min_sites": 2, "stall_s": 60}))
        for rounds in (2, 5):
            await bench.until(lambda rounds=rounds: running.store.run(run.id).rounds_done >= rounds)
            await asyncio.to_thread(restartable.stop)
            await asyncio.sleep(1)
            await asyncio.to_thread(restartable.start)
            await bench.until(lambda: answers(running.store))
        run = await bench.ended(run, 60)
        returning.cancel()
        assert (run.state, run.rounds_done) == ("finished", 12)
        for name, tensor in bench.model(run).items():
            np.testing.assert_allclose(tensor, initial[name] + 12 * 2.0, rtol=1e-5)


async def test_a_session_that_ends_for_want_of_the_database_ends_for_the_site_too(
    bench, spec, fault, monkeypatch
):
    """Whatever Python's collector does meanwhile: a call that is only dropped ends when it is collected."""
    run = await bench.enqueue(spec(evaluation={"initial": False}))

    def away(*records: object) -> None:
        raise StorageUnavailable("away")

    gc.collect()
    gc.disable()
    try:
        site = bench.site("a", fault=fault.SILENT)
        await bench.until(lambda: site.asked)
        monkeypatch.setattr(bench.running.store, "save", away)
        site.send(failure=pb.Failure(assignment_id=site.asked[0].id, reason="out of memory"))
        await bench.until(bench.tasks["a"].done)
    finally:
        gc.enable()
    assert site.errors == ["away"]
    monkeypatch.undo()
    site.fault = fault.NONE
    bench.attach(site)
    assert (await bench.ended(run)).state == "finished"


async def come_back(bench) -> None:
    """What daemons do: attach again when the session is lost."""
    while True:
        for name, task in list(bench.tasks.items()):
            if task.done():
                bench.attach(bench.sites[name])
        await asyncio.sleep(0.2)


def answers(store) -> bool:
    try:
        store.runs()
    except StorageUnavailable:
        return False
    return True


def until(holds) -> None:
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_a_database_that_does_not_answer_is_told_without_its_password(tmp_path, caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"postgresql://fedloom:hunter2@127.0.0.1:{unused.getsockname()[1]}/state?sslpassword=hunter2"
        database = open_database(url, tmp_path)
        with caplog.at_level(logging.DEBUG), pytest.raises(StorageUnavailable) as failure:
            database.do(lambda session: session.connection())
    assert "fedloom:***@127.0.0.1" in str([record.url for record in caplog.records])
    assert "hunter2" not in caplog.text + str([vars(record) for record in caplog.records])
    assert "hunter2" not in str(failure.value)


def test_after_a_failure_the_database_is_left_alone_for_a_while(tmp_path, monkeypatch):
    """Calls are made on the event loop, which must not stand still."""
    clock = SimpleNamespace(monotonic=lambda: 1000.0)
    monkeypatch.setattr("fedloom_server.database.time", clock)
    database = open_database("postgresql://127.0.0.1:1/state", tmp_path)
    tries = []
    event.listen(database.engine, "do_connect", lambda *told: tries.append(told))
    for _ in range(3):
        with pytest.raises(StorageUnavailable):
            database.do(lambda session: session.connection())
    assert len(tries) == 1
    clock.monotonic = lambda: 1001.0
    with pytest.raises(StorageUnavailable):
        database.do(lambda session: session.connection())
    assert len(tries) == 2


@pytest.mark.parametrize(
    "url", ["mysql://me:hunter2@db/state", "hunter2", "sqlite:///hunter2.db", "postgresql:hunter2"]
)
def test_a_url_that_is_none_of_postgresql_is_refused_and_not_repeated(url):
    with pytest.raises(BadSpec, match="database: wanted postgresql://") as refusal:
        parse_url(url)
    assert "hunter2" not in str(refusal.value)
