"""What a site tells of its data sets, when they change under a running daemon."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedloom_client import holdings
from fedloom_client.config import DataSource
from fedloom_client.holdings import Holdings


async def test_a_data_set_that_has_changed_is_told_over_a_new_session_and_the_work_goes_on(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings, "LOOK_S", 0.05)
    world.group.gate.clear()
    world.daemon()
    first = await world.attached()
    world.coordinator.assign(world.assignment())
    await world.group.started.wait()
    (world.folder / "a.txt").write_text("that is the question")
    second = await world.attached(2)
    assert [data.size_bytes for data in (*first.data_sets, *second.data_sets)] == [18, 20]
    assert list(second.open_assignments) == ["r1-train"]
    world.group.gate.set()
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    assert len(world.group.orders) == 1


async def test_files_that_still_grow_are_not_told_at_each_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Measured in turn: nothing, at two tries to attach, then 1, 2, 3 and 3 bytes."""
    sizes = iter([0, 0, 1, 2, 3, 3])
    monkeypatch.setattr(holdings, "LOOK_S", 0)
    monkeypatch.setattr(holdings, "data_set_bytes", lambda source: next(sizes))
    held = Holdings({"plays": DataSource(format="text", files=(str(tmp_path / "*.txt"),))})
    assert await held.tell() == await held.tell() == {"plays": 0}
    assert [record.message for record in caplog.records] == ["a data set has no files"]
    left: list[int] = []

    def tell_again() -> None:
        left.append(len(list(sizes)))
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await held.keep_told(tell_again)
    assert left == [0]
