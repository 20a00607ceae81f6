"""Doing assignments: each once, and never without an answer."""

import asyncio
import os
from typing import Any

import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom_client import assignments as assignments_module
from fedloom_client import signs as signs_module
from fedloom_client.assignments import Assignments
from fedloom_client.outbox import Outbox
from fedloom_client.training.orders import CHECKPOINT, WorkerResult
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import StorageUnavailable, TooManyCalls


async def test_a_training_is_uploaded_and_its_outcome_says_what_was_done(world: Any) -> None:
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until(lambda: world.coordinator.receipts)
    outcome = world.coordinator.kinds("outcome")[0]
    assert bytes(world.coordinator.spool["r1-train"]) == world.group.update
    assert outcome.update_bytes == len(world.group.update)
    assert (outcome.examples, outcome.tokens, dict(outcome.metrics)) == (12, 480, {"loss": 1.5})
    assert set(outcome.phase_seconds) == {"download", "train"}
    (order,) = world.group.orders
    assert (order.work, order.run_id, order.round, order.spec["data"]) == ("train", "run-1", 1, "plays")
    assert world.group.models == [b"theta" * 1000]


async def test_the_local_checkpoint_stays_until_the_update_is_in_the_outbox(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def add(self: Outbox, *arguments: Any) -> Any:
        outcome = await really_add(self, *arguments)
        there.append(checkpoint.exists())
        return outcome

    there: list[bool] = []
    really_add = Outbox.add
    monkeypatch.setattr(Outbox, "add", add)
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.group.started.wait()
    checkpoint = world.group.folders[0] / CHECKPOINT
    checkpoint.touch()
    world.group.gate.set()
    await world.coordinator.until_heard("outcome")
    assert there == [True]
    assert not checkpoint.exists()


async def test_a_delivered_update_stays_until_its_run_goes_on_or_ends(world: Any) -> None:
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("r1-train"))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    assert in_outbox(world) == ["r1-train"]
    world.coordinator.assign(world.assignment("r2-train", round=2))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train", "r2-train"])
    await world.until(lambda: in_outbox(world) == ["r2-train"])
    (entry,) = (world.state / "outbox").iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["outcome.json", "update.safetensors"]
    world.coordinator.send(run_ended=pb.RunEnded(run_id="run-1"))
    await world.until(lambda: in_outbox(world) == [])


async def test_a_delivered_update_that_the_coordinator_has_lost_is_sent_again(world: Any) -> None:
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("r1-train"))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    del world.coordinator.spool["r1-train"]
    world.coordinator.assign(world.assignment("r1-train"))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train", "r1-train"])
    assert bytes(world.coordinator.spool["r1-train"]) == world.group.update
    assert len(world.group.orders) == 1


def in_outbox(world: Any) -> list[str]:
    return sorted(path.name for path in (world.state / "outbox").iterdir())


async def test_progress_tells_every_phase_in_order(world: Any) -> None:
    world.group.gate.clear()
    world.coordinator.grants = False
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until_heard("progress")
    await asyncio.sleep(0.3)
    world.group.gate.set()
    await world.coordinator.until(lambda: phases(world)[-1:] == [pb.PHASE_WAIT])
    world.coordinator.grant("r1-train")
    await world.coordinator.until(lambda: world.coordinator.receipts)
    seen = phases(world)
    assert sorted(seen) == seen
    assert {pb.PHASE_START, pb.PHASE_WAIT} <= set(seen)


def phases(world: Any) -> list[int]:
    return [progress.phase for progress in world.coordinator.kinds("progress")]


async def test_an_evaluation_is_answered_without_an_upload(world: Any) -> None:
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("r1-evaluate", work=pb.WORK_EVALUATE))
    outcome = await world.coordinator.until_heard("outcome")
    assert (outcome.assignment_id, outcome.update_digest, outcome.examples) == ("r1-evaluate", "", 12)
    assert world.coordinator.receipts == []


async def test_what_a_training_measured_first_travels_with_its_outcome_and_over_a_restart(
    world: Any,
) -> None:
    world.group.before = WorkerResult(examples=7, tokens=70, metrics={"loss": 2.25})
    world.coordinator.grants = False
    daemon = world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment(measures=True))
    await world.coordinator.until_heard("outcome")
    await world.stop(daemon)
    world.daemon()
    await world.coordinator.until_heard("outcome", 2)
    assert [order.measures for order in world.group.orders] == [True]
    for outcome in world.coordinator.kinds("outcome"):
        assert (outcome.before.examples, outcome.before.tokens) == (7, 70)
        assert dict(outcome.before.metrics) == {"loss": 2.25}
        assert outcome.data_examples == 99


async def test_a_slow_start_and_encoding_are_signs_of_life_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signs_module, "BEAT_S", 0.01)
    monkeypatch.setattr(signs_module, "LONGEST_S", 0.05)
    heard: list[int] = []
    async with signs_module.signs_of_life(heard.append):
        async with asyncio.timeout(60):
            while len(heard) < 5:  # noqa: ASYNC110 (what beats tells nobody else)
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
    assert heard == [1, 2, 3, 4, 5]


async def test_an_assignment_sent_again_is_answered_again_and_not_done_again(world: Any) -> None:
    world.daemon(policy={"max_steps_per_round": 5})
    await world.attached()
    evaluation = world.assignment("r1-evaluate", work=pb.WORK_EVALUATE)
    refused = world.assignment("r2-evaluate", spec_json=world.spec_json(local={"steps": 6}))
    for count in (1, 2):
        world.coordinator.assign(evaluation)
        world.coordinator.assign(refused)
        await world.coordinator.until_heard("outcome", count)
        await world.coordinator.until_heard("refusal", count)
    assert len(world.group.orders) == 1


async def test_a_cancel_stops_the_work_and_nothing_of_it_is_sent(world: Any) -> None:
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.group.started.wait()
    world.coordinator.send(cancel=pb.Cancel(assignment_id="r1-train", reason="the round is over"))
    world.coordinator.assign(world.assignment("r2-evaluate", work=pb.WORK_EVALUATE))
    await world.coordinator.until(lambda: len(world.group.orders) == 2)
    assert world.group.cancelled == 1
    world.group.gate.set()
    assert (await world.coordinator.until_heard("outcome")).assignment_id == "r2-evaluate"
    assert world.coordinator.kinds("failure") == []
    assert world.group.stopped == 0


async def test_a_model_is_downloaded_once(world: Any) -> None:
    daemon = world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("r1-evaluate", work=pb.WORK_EVALUATE))
    world.coordinator.assign(world.assignment("r1-train"))
    await world.coordinator.until(lambda: world.coordinator.receipts)
    await world.stop(daemon)
    world.daemon()
    assert list((await world.attached(2)).held_digests) == [world.model.digest]
    world.coordinator.assign(world.assignment("r1-later", attempt=2))
    await world.coordinator.until(lambda: len(world.coordinator.receipts) == 2)
    assert sorted(world.coordinator.reads) == sorted([(world.model.digest, 0), (world.config_file.digest, 0)])


async def test_a_download_waits_for_a_coordinator_that_cannot_give_the_file_now(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom_client.backoff.Backoff.next_s", lambda self: 0.01)
    world.coordinator.read_errors = [StorageUnavailable("try again later"), TooManyCalls("end some first")]
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until(lambda: world.coordinator.receipts or world.coordinator.kinds("failure"))
    assert world.coordinator.receipts == ["r1-train"]


async def test_an_assignment_past_its_deadline_ends_though_nobody_cancels_it(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom_client.work.DEADLINE_GRACE_S", 0.1)
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment(deadline_s=0.2))
    assert "deadline of 0.2 s" in (await world.coordinator.until_heard("failure")).reason
    assert world.group.cancelled == len(world.group.orders)  # 1, unless it passed before the work began


async def test_the_end_of_a_run_stops_its_work_and_lets_all_of_it_go(world: Any) -> None:
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.group.started.wait()
    assert world.group.folders == [world.state / "runs" / "run-1"]
    folder = world.group.folders[0]
    for kept in ("packed", "logs"):
        (folder / kept).mkdir()
    world.coordinator.open.clear()
    world.coordinator.send(run_ended=pb.RunEnded(run_id="run-1"))
    await world.until(lambda: not (folder / "packed").exists())
    assert (world.group.cancelled, world.group.stopped) == (1, 1)
    assert [path.name for path in folder.iterdir()] == ["logs"]
    assert list((world.state / "outbox").iterdir()) == []


async def test_work_that_the_coordinator_does_not_ask_for_again_is_given_up(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues, told = [], []
    attached, receive = Assignments.attached, Assignments.receive
    monkeypatch.setattr(
        Assignments,
        "attached",
        lambda queue: (attached(queue), queues.append(queue), told.append("attached")),
    )
    monkeypatch.setattr(
        Assignments, "receive", lambda queue, asked: (receive(queue, asked), told.append(asked.id))
    )
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("kept"))
    await world.group.started.wait()
    world.coordinator.break_session()
    await world.until(lambda: told.count("attached") == 2 and told[-1] == "kept")
    queues[-1]._drop_unconfirmed()  # as the time to send it again is over
    await asyncio.sleep(0.1)
    assert world.group.cancelled == 0
    monkeypatch.setattr(assignments_module, "RESEND_S", 0.3)
    world.coordinator.open.clear()
    world.coordinator.break_session()
    await world.attached(3)
    await world.until(lambda: world.group.cancelled)
    assert world.group.cancelled == 1


async def test_an_update_is_named_by_the_digest_of_its_bytes(world: Any) -> None:
    world.group.update = os.urandom(300_000)
    world.coordinator.grants = False
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("run/1:train"))
    outcome = await world.coordinator.until_heard("outcome")
    (folder,) = (world.state / "outbox").iterdir()
    assert outcome.update_digest == digest_of_file(folder / "update.safetensors")
