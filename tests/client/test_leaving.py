"""A site that its operator is about to stop: what it has is finished and delivered, and nothing begins."""

import asyncio
import logging
import os

import pytest
from typer.testing import CliRunner

from fedloom_client.cli import app
from fedloom_client.outbox import Outbox
from fedloom_client.statedir import LEAVE_SIGNAL, StateDir
from fedloom_common.errors import WrongState


async def test_work_under_way_is_finished_and_delivered_before_the_daemon_ends(world, monkeypatch):
    monkeypatch.setattr("fedloom_client.daemon.LEFT_S", 0.05)
    world.group.gate.clear()
    daemon = world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("r1-train"))
    await asyncio.wait_for(world.group.started.wait(), 60)

    os.kill(StateDir(world.state).holder(), LEAVE_SIGNAL)
    await asyncio.sleep(0.3)
    world.coordinator.assign(world.assignment("other", run_id="run-2"))
    refusal = await world.coordinator.until_heard("refusal")
    assert not daemon.done()
    world.coordinator.grants = False
    world.group.gate.set()
    await world.coordinator.until_heard("outcome")
    await asyncio.sleep(0.3)
    assert not daemon.done()
    world.coordinator.grant("r1-train")
    await asyncio.wait_for(daemon, 60)

    assert (refusal.assignment_id, "drains" in refusal.reason) == ("other", True)
    assert world.coordinator.receipts == ["r1-train"]


async def test_work_that_has_not_begun_is_refused(world):
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("first"))
    await asyncio.wait_for(world.group.started.wait(), 60)
    world.coordinator.assign(world.assignment("second", run_id="run-2"))
    await asyncio.sleep(0.3)

    os.kill(os.getpid(), LEAVE_SIGNAL)

    assert (await world.coordinator.until_heard("refusal")).assignment_id == "second"
    world.group.gate.set()


async def test_a_daemon_without_work_ends_at_once(world, caplog):
    caplog.set_level(logging.INFO)
    daemon = world.daemon()
    await world.attached()
    await world.coordinator.until_heard("heartbeat")

    os.kill(os.getpid(), LEAVE_SIGNAL)
    await asyncio.wait_for(daemon, 60)

    told = [record.message for record in caplog.records]
    assert told[-3:] == ["the site drains", "drained", "stopped"]
    assert (world.coordinator.kinds("refusal"), world.coordinator.kinds("failure")) == ([], [])


def test_with_no_daemon_the_command_says_so(world, tmp_path):
    config = tmp_path / "site.yaml"
    config.write_text("{coordinator: 'a:1', insecure: oslo, state_dir: none, data: {texts: {files: [x]}}}")
    with pytest.raises(WrongState, match="no client daemon uses state_dir"):
        CliRunner().invoke(app, ["drain", "--config", str(config)], catch_exceptions=False)


async def test_a_drain_while_the_daemon_starts_is_heard(world, monkeypatch):
    """Without a handler the signal would kill the process."""
    load, loaded = Outbox.load, []

    def slow(self: Outbox) -> None:
        os.kill(os.getpid(), LEAVE_SIGNAL)
        load(self)
        loaded.append(self)

    monkeypatch.setattr(Outbox, "load", slow)
    await asyncio.wait_for(world.daemon(), 60)
    assert len(loaded) == 1
