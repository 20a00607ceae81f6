"""Assignments that are not done: refused by policy, bad, or failed on the way."""

import os
from typing import Any

import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom_common.errors import TrainingFailed

NO_STEPS = (
    '{"name": "tiny", "model": {"config": {"model_type": "gpt2"}}, "data": "plays", "rounds": 3, "local": {}}'
)
BAD_DIGEST = pb.Blob(name="model.safetensors", digest="../../etc/passwd", size_bytes=9)


def asset(name: str) -> pb.Blob:
    return pb.Blob(name=name, digest="blake3:" + "0" * 64, size_bytes=5)


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
    world.coordinator.assign(world.assignment(spec_json=world.spec_json(**changes)))
    refusal = await world.coordinator.until_heard("refusal")
    assert refusal.assignment_id == "r1-train"
    assert reason in refusal.reason
    assert world.model.digest not in [digest for digest, _ in world.coordinator.reads]
    assert world.group.orders == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"spec_json": "{"}, "Invalid JSON", id="spec-is-no-json"),
        pytest.param({"spec_json": NO_STEPS}, "give either steps or epochs", id="spec-is-wrong"),
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


async def test_a_failed_training_is_reported_and_the_next_assignment_is_done(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    world.group.error = TrainingFailed("rank 1 died\nZeroDivisionError: division by zero")
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    failure = await world.coordinator.until_heard("failure")
    told = "(the rest is in the site's log: policy.failure_details is false)"
    assert failure.reason == f"rank 1 died {told}"
    assert [record.details for record in caplog.records if record.message == "work not done"] == [
        "ZeroDivisionError: division by zero"
    ]
    assert list((world.state / "outbox").iterdir()) == []
    world.group.error = None
    world.coordinator.assign(world.assignment("r1-again", attempt=2))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-again"])


async def test_a_failure_that_names_a_file_of_any_bytes_is_told_and_the_daemon_goes_on(world: Any) -> None:
    world.group.error = TrainingFailed(os.fsdecode(b"caf\xe9.txt is not UTF-8 text"))
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    failure = await world.coordinator.until_heard("failure")
    assert failure.reason == r"caf\udce9.txt is not UTF-8 text"
    world.group.error = None
    world.coordinator.assign(world.assignment("r1-again", attempt=2))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-again"])


async def test_a_crash_inside_the_daemon_is_a_failure_too(world: Any) -> None:
    world.group.error = KeyError("a bug")
    world.daemon()
    await world.attached()
    world.coordinator.assign(world.assignment())
    reason = (await world.coordinator.until_heard("failure")).reason
    assert reason.startswith("a KeyError that fedloom does not know (the rest is in")
    assert "a bug" not in reason


async def test_a_site_that_permits_it_tells_all_of_a_failure(world: Any) -> None:
    world.group.error = TrainingFailed("rank 1 died\nZeroDivisionError: division by zero")
    world.daemon(policy={"failure_details": True})
    await world.attached()
    world.coordinator.assign(world.assignment())
    failure = await world.coordinator.until_heard("failure")
    assert failure.reason == "rank 1 died\nZeroDivisionError: division by zero"
