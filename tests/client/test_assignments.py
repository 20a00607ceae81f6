"""Doing assignments: each once, in order, and never without an answer."""

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom_client import assignments as assignments_module
from fedloom_client import cache as cache_module
from fedloom_client import signs as signs_module
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import TrainingFailed


def spec_json(**changes: Any) -> str:
    facts = {
        "name": "tiny",
        "model": {"config": {"model_type": "gpt2"}},
        "data": "plays",
        "rounds": 3,
        "local": {"steps": 5},
    }
    return json.dumps(facts | changes)


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


async def test_a_delivered_update_stays_until_its_run_goes_on_or_ends(world: Any) -> None:
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("r1-train"))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    assert in_outbox(world) == ["r1-train"]
    world.coordinator.assign(world.assignment("r2-train", round=2))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train", "r2-train"])
    await until(lambda: in_outbox(world) == ["r2-train"])
    (entry,) = (world.state / "outbox").iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["outcome.json", "update.safetensors"]
    world.coordinator.send(run_ended=pb.RunEnded(run_id="run-1"))
    await until(lambda: in_outbox(world) == [])


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


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it does not come true")


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


async def test_assignments_are_done_one_at_a_time_in_order(world: Any) -> None:
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    for name in ("one", "two"):
        world.coordinator.assign(world.assignment(name, work=pb.WORK_EVALUATE))
    await world.group.started.wait()
    await asyncio.sleep(0.2)
    assert [order.id for order in world.group.orders] == ["one"]
    world.group.gate.set()
    await world.coordinator.until_heard("outcome", 2)
    assert [order.id for order in world.group.orders] == ["one", "two"]


async def test_work_that_waits_for_other_work_says_so_until_it_begins(world: Any) -> None:
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("r1-train"))
    await world.group.started.wait()
    world.coordinator.assign(world.assignment("other-train", run_id="run-2"))

    def phases(name: str) -> list[int]:
        return [told.phase for told in world.coordinator.kinds("progress") if told.assignment_id == name]

    await world.coordinator.until(lambda: phases("other-train") == [pb.PHASE_QUEUED])
    world.group.gate.set()
    await world.coordinator.until(lambda: "other-train" in world.coordinator.receipts)
    assert pb.PHASE_QUEUED not in phases("r1-train")
    await world.coordinator.until(lambda: phases("other-train")[-1] != pb.PHASE_QUEUED)


async def test_a_slow_start_and_encoding_are_signs_of_life_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signs_module, "BEAT_S", 0.01)
    monkeypatch.setattr(signs_module, "LONGEST_S", 0.05)
    heard: list[int] = []
    async with signs_module.signs_of_life(heard.append):
        await until(lambda: len(heard) == 5)
        await asyncio.sleep(0.1)
    assert heard == [1, 2, 3, 4, 5]


async def test_a_site_that_says_so_works_for_two_runs_at_once_but_for_each_on_one_thing(world: Any) -> None:
    world.group.gate.clear()
    world.daemon(concurrent_assignments=2)
    await world.attached()
    for name, run_id in (("a1", "a"), ("a2", "a"), ("b1", "b"), ("c1", "c")):
        world.coordinator.assign(world.assignment(name, run_id=run_id))
    await until(lambda: len(world.group.orders) >= 2)
    await asyncio.sleep(0.2)
    assert [order.id for order in world.group.orders] == ["a1", "b1"]
    world.group.gate.set()
    await world.coordinator.until(lambda: len(world.coordinator.receipts) == 4)
    assert sorted(world.coordinator.receipts) == ["a1", "a2", "b1", "c1"]


async def test_a_model_that_training_needs_is_not_dropped_for_another_runs(world: Any) -> None:
    world.group.gate.clear()
    world.daemon(concurrent_assignments=2, cache_models=1)
    await world.attached()
    other = world.coordinator.add_file("model.safetensors", b"omega" * 1000)
    world.coordinator.assign(world.assignment("a1", run_id="a"))
    await until(lambda: len(world.group.orders) == 1)
    world.coordinator.assign(world.assignment("b1", run_id="b", model=other))
    await until(lambda: len(world.group.orders) == 2)
    assert all(Path(order.model_path).exists() for order in world.group.orders)
    world.group.gate.set()
    await world.coordinator.until(lambda: len(world.coordinator.receipts) == 2)


@pytest.mark.parametrize(
    ("policy", "changes", "reason"),
    [
        pytest.param({"max_steps_per_round": 4}, {}, "max_steps_per_round is 4, the run wants 5", id="steps"),
        pytest.param({"model_types": ["llama"]}, {}, "permits llama, the model is a gpt2", id="model-type"),
        pytest.param({}, {"data": "letters"}, "data has plays, the run wants letters", id="data"),
    ],
)
async def test_what_the_policy_forbids_is_refused_without_fetching_the_model(
    world: Any, policy: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    world.daemon(policy=policy)
    await world.attached()
    world.coordinator.assign(world.assignment(spec_json=spec_json(**changes)))
    refusal = await world.coordinator.until_heard("refusal")
    assert refusal.assignment_id == "r1-train"
    assert reason in refusal.reason
    assert world.model.digest not in [digest for digest, _ in world.coordinator.reads]
    assert world.group.orders == []


BAD_DIGEST = pb.Blob(name="model.safetensors", digest="../../etc/passwd", size_bytes=9)


def asset(name: str) -> pb.Blob:
    return pb.Blob(name=name, digest="blake3:" + "0" * 64, size_bytes=5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"spec_json": "{"}, "Invalid JSON", id="spec-is-no-json"),
        pytest.param({"spec_json": spec_json(local={})}, "give either steps or epochs", id="spec-is-wrong"),
        pytest.param({"work": 7}, "known are 1 (train), 2 (evaluate)", id="unknown-work"),
        pytest.param({"model": BAD_DIGEST}, "blake3: and 64 hexadecimal digits", id="digest"),
        pytest.param({"deadline_s": -1}, "wanted 0 or more", id="deadline"),
        pytest.param({"assets": [asset("../evil.json")]}, "not a plain file name", id="path-as-asset"),
        pytest.param({"assets": [asset(".hidden.json")]}, "not a plain file name", id="hidden-asset"),
        pytest.param({"assets": [asset("modeling_evil.py")]}, "'modeling_evil.py' is not allowed", id="code"),
        pytest.param({"assets": [asset("vocab.json")]}, "config.json among them", id="no-config"),
        pytest.param({"assets": [asset("config.json")] * 2}, "different names", id="asset-twice"),
        pytest.param({"assets": [asset("config.json")]}, "no file blake3:000", id="asset-that-is-not-there"),
    ],
)
async def test_a_bad_assignment_fails_with_the_reason(
    world: Any, changes: dict[str, Any], reason: str
) -> None:
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment(**changes))
    failure = await world.coordinator.until_heard("failure")
    assert failure.assignment_id == "r1-train"
    assert reason in failure.reason
    assert world.group.orders == []


async def test_a_failed_training_is_reported_and_the_next_assignment_is_done(world: Any) -> None:
    world.group.error = TrainingFailed("rank 1 died\nZeroDivisionError: division by zero")
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    failure = await world.coordinator.until_heard("failure")
    assert failure.reason == "rank 1 died\nZeroDivisionError: division by zero"
    assert list((world.state / "outbox").iterdir()) == []
    world.group.error = None
    world.coordinator.assign(world.assignment("r1-again", attempt=2))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-again"])


async def test_a_crash_inside_the_daemon_is_a_failure_too(world: Any) -> None:
    world.group.error = KeyError("a bug")
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    assert (await world.coordinator.until_heard("failure")).reason == "KeyError: 'a bug'"


async def test_an_assignment_sent_again_is_answered_again_and_not_done_again(world: Any) -> None:
    world.daemon(policy={"max_steps_per_round": 5})
    await world.attached()
    evaluation = world.assignment("r1-evaluate", work=pb.WORK_EVALUATE)
    refused = world.assignment("r2-evaluate", spec_json=spec_json(local={"steps": 6}))
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


async def test_a_cancelled_assignment_that_waits_is_never_begun(world: Any) -> None:
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    for name in ("one", "two", "three"):
        world.coordinator.assign(world.assignment(name, work=pb.WORK_EVALUATE))
    await world.group.started.wait()
    world.coordinator.send(cancel=pb.Cancel(assignment_id="two", reason="not wanted"))
    await asyncio.sleep(0.2)
    world.group.gate.set()
    await world.coordinator.until_heard("outcome", 2)
    assert [order.id for order in world.group.orders] == ["one", "three"]


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


async def test_an_assignment_past_its_deadline_ends_though_nobody_cancels_it(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom_client.work.DEADLINE_GRACE_S", 0.1)
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment(deadline_s=0.2))
    assert "deadline of 0.2 s" in (await world.coordinator.until_heard("failure")).reason
    assert world.group.cancelled == 1


async def test_while_the_coordinator_drains_nothing_new_begins(world: Any) -> None:
    world.daemon()
    await world.coordinator.until_heard("heartbeat")
    world.coordinator.send(drain=pb.Drain(reason="shutdown"))
    world.coordinator.assign(world.assignment())
    await asyncio.sleep(0.3)
    assert world.group.orders == []
    world.coordinator.break_session()
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])


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
    for _ in range(100):
        if not (folder / "packed").exists():
            break
        await asyncio.sleep(0.02)
    assert (world.group.cancelled, world.group.stopped) == (1, 1)
    assert [path.name for path in folder.iterdir()] == ["logs"]
    assert list((world.state / "outbox").iterdir()) == []


async def test_work_that_the_coordinator_does_not_ask_for_again_is_given_up(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignments_module, "RESEND_S", 0.3)
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("kept"))
    await world.group.started.wait()
    world.coordinator.break_session()
    await world.attached(2)
    await asyncio.sleep(0.6)
    assert world.group.cancelled == 0
    world.coordinator.open.clear()
    world.coordinator.break_session()
    await world.attached(3)
    for _ in range(100):
        if world.group.cancelled:
            break
        await asyncio.sleep(0.02)
    assert world.group.cancelled == 1


async def test_a_full_disk_fails_the_assignment_and_leaves_nothing_behind(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]
    write = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if full and offset + len(data) > 500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    failure = await world.coordinator.until_heard("failure")
    assert str(world.state / "models") in failure.reason
    assert "5000 bytes" in failure.reason
    assert list((world.state / "models").iterdir()) == []
    full.clear()
    world.coordinator.assign(world.assignment("r1-again", attempt=2))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-again"])


async def test_a_model_that_cannot_fit_is_not_begun(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": cache_module.DISK_RESERVE_BYTES + 4999})
    world.daemon()
    await world.attached()
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    world.coordinator.assign(world.assignment())
    failure = await world.coordinator.until_heard("failure")
    assert "5000 bytes are wanted for the model" in failure.reason
    assert world.model.digest not in [digest for digest, _ in world.coordinator.reads]


async def test_a_disk_that_fills_during_training_is_named(world: Any) -> None:
    world.group.error = TrainingFailed("OSError: [Errno 28] No space left on device: 'packed.bin'")
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    reason = (await world.coordinator.until_heard("failure")).reason
    assert reason.startswith(f"no space left in state_dir {world.state}")
    assert "packed.bin" in reason


async def test_a_disk_that_fills_outside_of_transfers_is_named_too(world: Any) -> None:
    world.group.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    reason = (await world.coordinator.until_heard("failure")).reason
    assert reason.startswith(f"no space left in state_dir {world.state}")


async def test_an_update_is_named_by_the_digest_of_its_bytes(world: Any) -> None:
    world.group.update = os.urandom(300_000)
    world.coordinator.grants = False
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment("run/1:train"))
    outcome = await world.coordinator.until_heard("outcome")
    (folder,) = (world.state / "outbox").iterdir()
    assert outcome.update_digest == digest_of_file(folder / "update.safetensors")
