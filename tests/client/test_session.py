"""Attaching to a coordinator, and attaching again."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedloom_client import session as session_module
from fedloom_client.credential import keep_credential
from fedloom_client.mailbox import PROGRESS_INTERVAL_S
from fedloom_client.status import ill_health
from fedloom_client.training.orders import WorkerProgress
from fedloom_common.authority import Authority
from fedloom_common.identity import Role, TlsFiles
from fedloom_common.rotation import LiveCredential


async def test_hello_says_what_the_site_has(world: Any) -> None:
    world.daemon(labels={"ward": "icu"})
    hello = await world.attached()
    assert hello.protocol_version == 1
    assert dict(hello.labels) == {"ward": "icu"}
    assert [device.kind for device in hello.devices] == ["cpu"]
    assert hello.memory_bytes > 1 << 28
    assert {data.name: data.size_bytes for data in hello.data_sets} == {"plays": len("to be or not to be")}
    assert list(hello.held_digests) == list(hello.open_assignments) == []


async def test_heartbeats_come_at_the_pace_that_the_coordinator_asks_for(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", noted)
    world.coordinator.heartbeat_s = 0.125
    began_s = time.monotonic()
    world.daemon()
    await world.coordinator.until_heard("heartbeat", 5)
    assert time.monotonic() - began_s >= 4 * 0.125
    assert pauses.count(0.125) >= 4


async def test_the_site_attaches_again_after_the_coordinator_was_away(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedloom_client")
    world.daemon()
    await world.coordinator.until_heard("heartbeat")
    await world.coordinator.stop()
    beats = len(world.coordinator.kinds("heartbeat"))
    await asyncio.sleep(1.5)
    await world.coordinator.start()
    await world.attached(2)
    await world.coordinator.until_heard("heartbeat", beats + 1)
    lines = [record for record in caplog.records if record.name == session_module.__name__]
    assert [line.message for line in lines] == ["attached", "not attached; trying on", "attached"]


async def test_work_goes_on_while_the_session_is_broken_and_its_result_goes_over_the_next(world: Any) -> None:
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.group.started.wait()
    world.coordinator.break_session()
    assert list((await world.attached(2)).open_assignments) == ["r1-train"]
    world.group.gate.set()
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    assert len(world.group.orders) == 1


def tries_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each pause at the slowest pace, and makes it short."""
    tries: list[str] = []
    monkeypatch.setattr("fedloom_client.backoff.Backoff.slowest_s", lambda self: tries.append("") or 0.05)
    return tries


async def until_more_than(count: int, tries: list[str]) -> None:
    async with asyncio.timeout(60):
        while len(tries) <= count:  # noqa: ASYNC110 (the daemon tells nobody)
            await asyncio.sleep(0.02)


async def test_a_refused_site_says_what_to_do_once_and_tries_at_the_slowest_pace(
    world: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom_client.backoff.LONGEST_S", 0.2)
    tries = tries_of(monkeypatch)
    world.coordinator.attach_error = (grpc.StatusCode.UNAUTHENTICATED, "the certificate is revoked")
    world.daemon()
    await until_more_than(2, tries)
    (error,) = errors(caplog)
    assert "the certificate is revoked" in error.reason
    assert "fedloom provision site" in error.reason
    world.coordinator.attach_error = None
    await world.attached()


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno == logging.ERROR]


async def test_a_blocked_site_says_why_once_and_waits_for_a_person(
    world: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tries_of(monkeypatch)
    world.coordinator.attach_error = (
        grpc.StatusCode.PERMISSION_DENIED,
        "site oslo is blocked: its key was stolen",
    )
    world.daemon()
    await until_more_than(2, tries)
    (error,) = errors(caplog)
    assert error.reason.endswith("site oslo is blocked: its key was stolen; ask who runs the federation")
    world.coordinator.attach_error = None
    await world.attached()


async def test_another_protocol_version_is_an_error_that_names_both(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    world.coordinator.protocol_version = 2
    world.daemon()
    await world.until(lambda: errors(caplog))
    (error,) = errors(caplog)
    assert "protocol version 2" in error.reason
    assert "version 1" in error.reason


async def test_a_coordinator_that_never_answers_hello_is_left(
    world: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "WELCOME_S", 0.3)
    world.coordinator.is_silent = True
    world.daemon()
    await world.attached(2)
    (line,) = [record for record in caplog.records if record.message.startswith("not attached")]
    assert "does not answer Hello within 0.3 s" in line.reason
    assert "is not attached" in str(ill_health(world.state / "status.json"))


async def test_progress_is_coalesced_and_its_latest_value_arrives(world: Any) -> None:
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.group.started.wait()
    began_s = time.monotonic()
    for step in range(200):
        world.group.report(WorkerProgress(phase="train", done=step, total=200, loss=2.0, tokens_per_s=1e4))
        await asyncio.sleep(0.005)
    progress = await world.coordinator.until(
        lambda: [p for p in world.coordinator.kinds("progress") if p.done == 199]
    )
    assert progress[0].loss == 2.0
    most = 3 + (time.monotonic() - began_s) / PROGRESS_INTERVAL_S  # 8 where nothing else goes on
    assert len(world.coordinator.kinds("progress")) <= most


async def test_a_new_certificate_is_used_over_a_new_session_and_the_work_goes_on(
    world: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = []
    monkeypatch.setattr(
        "fedloom_client.daemon.Session",
        lambda *args, **values: sessions.append(session_module.Session(*args, **values)) or sessions[-1],
    )
    caplog.set_level(logging.INFO, "fedloom_client")
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.group.started.wait()
    sessions[0].renew()
    assert list((await world.attached(2)).open_assignments) == ["r1-train"]
    world.group.gate.set()
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    assert len(world.group.orders) == 1
    lines = [record.message for record in caplog.records if record.name == session_module.__name__]
    assert lines == ["attached", "attached"]


async def test_a_refused_site_tries_a_new_certificate_at_once(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = []
    monkeypatch.setattr(
        "fedloom_client.daemon.Session",
        lambda *args, **values: sessions.append(session_module.Session(*args, **values)) or sessions[-1],
    )
    monkeypatch.setattr("fedloom_client.backoff.Backoff.slowest_s", lambda self: 1000)
    world.coordinator.attach_error = (grpc.StatusCode.UNAUTHENTICATED, "the certificate has been revoked")
    world.daemon()
    async with asyncio.timeout(60):
        while "revoked" not in str(ill_health(world.state / "status.json")):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # it pauses
    world.coordinator.attach_error = None
    assert world.coordinator.hellos == []
    sessions[0].renew()
    await world.coordinator.until_heard("heartbeat")
    assert ill_health(world.state / "status.json") is None


async def test_a_certificate_that_changes_is_used_and_a_wrong_one_is_told_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom_client.credential.LOOK_S", 0.01)
    authority = Authority.create(tmp_path / "ca", "fed.test")
    tls = TlsFiles(ca=tmp_path / "ca/ca.crt", certificate=tmp_path / "own.crt", key=tmp_path / "own.key")
    authority.issue(Role.SITE, "ward-a", days=3).save(tls.certificate, tls.key)
    credential, renewed = LiveCredential(tls), asyncio.Event()
    before = credential.expires
    keeping = asyncio.create_task(keep_credential(credential, renewed.set))
    new = authority.issue(Role.SITE, "ward-a", days=99)
    tls.certificate.write_bytes(new.certificate)  # and its key has yet to be copied
    async with asyncio.timeout(60):
        while not credential.failures:  # noqa: ASYNC110 (any condition at all)
            await asyncio.sleep(0.01)
    assert credential.expires == before
    assert not renewed.is_set()
    tls.key.write_bytes(new.key)
    await asyncio.wait_for(renewed.wait(), 60)
    assert credential.expires > before
    keeping.cancel()
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == ["its validity ends soon", "a changed tls file is wrong; what was in use stays"]
