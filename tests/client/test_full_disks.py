"""Disks that are full: what did not fit is named, and nothing of it stays."""

import errno
import os
from typing import Any

import pytest

from fedloom_client import cache as cache_module
from fedloom_common.errors import TrainingFailed


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
    world.daemon(policy={"failure_details": True})
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
