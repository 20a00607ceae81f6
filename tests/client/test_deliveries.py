"""Getting finished trainings to the coordinator, whatever breaks on the way."""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom_client import daemon as daemon_module
from fedloom_common.errors import BadSpec


async def test_an_interrupted_upload_goes_on_from_the_durable_byte(world: Any) -> None:
    world.group.update = os.urandom(5 << 20)
    world.coordinator.cut_after_bytes = 2 << 20
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until(lambda: world.coordinator.receipts)
    assert world.coordinator.write_offsets == [0, 2 << 20]
    assert bytes(world.coordinator.spool["r1-train"]) == world.group.update


async def test_a_pace_at_which_a_chunk_would_outlast_all_patience_only_makes_chunks_smaller(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom_common.transfer.STALL_S", 3.0)
    world.group.update = os.urandom(5000)
    world.daemon(upload_bytes_per_s=1000)
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until(lambda: world.coordinator.receipts)
    assert world.coordinator.write_offsets == [0]
    assert bytes(world.coordinator.spool["r1-train"]) == world.group.update


async def test_an_upload_goes_on_after_the_coordinator_was_away(world: Any) -> None:
    world.group.update = os.urandom(3 << 20)
    world.coordinator.grants = False
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until_heard("outcome")
    world.coordinator.cut_after_bytes = 1 << 20
    world.coordinator.grant("r1-train")
    await world.coordinator.until(lambda: world.coordinator.cut_after_bytes is None)
    await world.coordinator.stop()
    await asyncio.sleep(0.5)
    world.coordinator.grants = True
    await world.coordinator.start()
    await world.coordinator.until(lambda: world.coordinator.receipts)
    assert bytes(world.coordinator.spool["r1-train"]) == world.group.update


async def test_a_lost_receipt_does_not_send_the_update_again(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world.coordinator.grants = False
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until_heard("outcome")
    world.coordinator.write_errors = [(grpc.StatusCode.UNAVAILABLE, "the line broke")]
    world.coordinator.receipts = ["r1-train"]
    world.coordinator.grant("r1-train")
    await world.until(lambda: "update delivered" in caplog.text)
    assert world.coordinator.write_errors == []
    assert world.coordinator.write_offsets == []


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(grpc.StatusCode.INVALID_ARGUMENT, id="bad-tensor"),
        pytest.param(grpc.StatusCode.PERMISSION_DENIED, id="not-permitted"),
        pytest.param(grpc.StatusCode.FAILED_PRECONDITION, id="wrong-state"),
        pytest.param(grpc.StatusCode.NOT_FOUND, id="not-found"),
    ],
)
async def test_an_update_that_is_not_taken_is_dropped_with_one_line(
    world: Any, caplog: pytest.LogCaptureFixture, code: grpc.StatusCode
) -> None:
    world.coordinator.write_errors = [(code, "tensor wte is not finite")]
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until_heard("outcome")
    await outbox_is_empty(world)
    (line,) = [record for record in caplog.records if "does not take" in record.message]
    assert "tensor wte is not finite" in line.reason


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(grpc.StatusCode.ABORTED, id="attempt-failed"),
        pytest.param(grpc.StatusCode.RESOURCE_EXHAUSTED, id="coordinator's-disk-is-full"),
        pytest.param(grpc.StatusCode.DATA_LOSS, id="corrupt-chunk"),
    ],
)
async def test_an_attempt_that_failed_is_tried_again(world: Any, code: grpc.StatusCode) -> None:
    world.coordinator.write_errors = [(code, "not this time")]
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until(lambda: world.coordinator.receipts)
    assert world.coordinator.write_errors == []
    assert world.coordinator.receipts == ["r1-train"]
    assert bytes(world.coordinator.spool["r1-train"]) == world.group.update
    assert len(world.group.orders) == 1


async def test_a_certificate_that_is_renewed_in_time_costs_no_training(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.coordinator.grants = False
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until_heard("outcome")
    opened, expired = daemon_module.open_channel, [True]

    def open_channel(*arguments: Any, **named: Any) -> grpc.aio.Channel:
        if expired:
            expired.pop()
            raise BadSpec("site.crt expired")
        return opened(*arguments, **named)

    monkeypatch.setattr(daemon_module, "open_channel", open_channel)
    world.coordinator.grant("r1-train")
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    assert expired == []


async def test_chunks_that_are_always_corrupt_are_given_up(
    world: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom_client.backoff.Backoff.next_s", lambda self: 0.01)
    world.coordinator.write_errors = [(grpc.StatusCode.DATA_LOSS, "corrupt")] * 5
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until_heard("outcome")
    await outbox_is_empty(world)
    assert world.coordinator.write_errors == []
    assert "an update is given up" in caplog.text
    failure = await world.coordinator.until_heard("failure")
    assert failure.reason.startswith("5 uploads broke off at one place: ")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(Path.unlink, "the finished update cannot be read: ", id="gone"),
        pytest.param(lambda path: os.truncate(path, 3), "5 uploads broke off at one place: ", id="cut-short"),
    ],
)
async def test_an_update_that_can_no_longer_be_read_fails_with_the_reason(
    world: Any, spoil: Callable[[Path], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom_client.backoff.Backoff.next_s", lambda self: 0.01)
    world.coordinator.grants = False
    world.coordinator.spool["r1-train"] = bytearray(b"trai")
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until_heard("outcome")
    spoil(world.state / "outbox" / "r1-train" / "update.safetensors")
    world.coordinator.grant("r1-train")
    failure = await world.coordinator.until_heard("failure")
    assert failure.reason.startswith(reason)
    await outbox_is_empty(world)


async def test_a_finished_training_survives_a_restart_and_is_sent_without_training_again(world: Any) -> None:
    world.coordinator.grants = False
    daemon = world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    first = await world.coordinator.until_heard("outcome")
    await world.stop(daemon)
    world.coordinator.grants = True
    world.daemon()
    assert list((await world.attached(2)).open_assignments) == ["r1-train"]
    assert await world.coordinator.until_heard("outcome", 2) == first
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    assert bytes(world.coordinator.spool["r1-train"]) == world.group.update
    assert len(world.group.orders) == 1


async def test_a_run_whose_end_was_not_heard_is_named_at_attach_and_cleared_away(world: Any) -> None:
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    world.coordinator.break_session()
    assert list((await world.attached(2)).kept_runs) == ["run-1"]
    world.coordinator.send(run_ended=pb.RunEnded(run_id="run-1"))
    await outbox_is_empty(world)


async def test_what_was_not_finished_is_cleared_away_at_the_start(world: Any) -> None:
    unfinished = world.state / "outbox" / "r1-train"
    unfinished.mkdir(parents=True)
    (unfinished / "update.safetensors").write_bytes(b"half")
    cut = world.state / "outbox" / "r2-train"
    cut.mkdir()
    (cut / "update.safetensors").write_bytes(b"half")
    outcome = {"assignment_id": "r2-train", "update_bytes": 9, "examples": 1, "tokens": 1}
    entry = {"run_id": "r", "round": 1, "attempt": 1, "path": "update.safetensors", "outcome": outcome}
    (cut / "outcome.json").write_text(json.dumps(entry))
    half = [world.state / "runs" / "r" / name for name in (".checkpoint.7.partial", "residual/.a.7.partial")]
    for path in half:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    world.daemon()
    assert list((await world.attached()).open_assignments) == []
    await outbox_is_empty(world)
    assert not any(path.exists() for path in half)


async def test_a_cancelled_training_that_waits_for_its_upload_is_removed(world: Any) -> None:
    world.coordinator.grants = False
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until_heard("outcome")
    assert (world.state / "outbox" / "r1-train" / "update.safetensors").exists()
    world.coordinator.open.clear()
    world.coordinator.send(cancel=pb.Cancel(assignment_id="r1-train", reason="too late"))
    await outbox_is_empty(world)
    world.coordinator.break_session()
    assert list((await world.attached(2)).open_assignments) == []
    assert world.coordinator.receipts == []


async def test_a_later_round_of_the_run_replaces_a_training_that_was_never_fetched(world: Any) -> None:
    world.coordinator.grants = False
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("r1-train"))
    world.coordinator.assign(world.assignment("x1-train", run_id="run-2"))
    await world.coordinator.until_heard("outcome", 2)
    world.coordinator.assign(world.assignment("r2-train", round=2))
    await world.coordinator.until_heard("outcome", 3)
    assert sorted(path.name for path in (world.state / "outbox").iterdir()) == ["r2-train", "x1-train"]


async def test_leave_to_upload_what_is_not_here_is_only_logged(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world.daemon()
    await world.attached()
    world.coordinator.grant("unknown")
    world.coordinator.assign(world.assignment())
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    assert "leave to upload what is not here" in caplog.text


async def outbox_is_empty(world: Any) -> None:
    await world.until(lambda: not list((world.state / "outbox").iterdir()))
