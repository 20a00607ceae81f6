"""A site's control variates go with the updates that counted, as is told with the run's next training."""

from typing import Any

import pytest
import torch

from fedloom_common.leavings import Leavings
from fedloom_common.tensors import read_tensors, write_tensors

SCAFFOLD = {"steps": 5, "optimizer": {"name": "sgd"}, "algorithm": "scaffold"}


@pytest.mark.parametrize("restarts", [False, True])
async def test_a_training_begins_from_what_the_last_update_that_counted_has_left(
    world: Any, monkeypatch: pytest.MonkeyPatch, restarts: bool
) -> None:
    perform, begins_from = world.group.perform, []
    leavings = Leavings(world.state / "runs" / "run-1" / "control")

    async def leaving(order: Any, on_progress: Any) -> Any:
        """Leave the round's number."""
        kept = leavings.kept
        begins_from.append(int(dict(read_tensors(kept))["round"]) if kept.exists() else 0)
        leavings.prepared.parent.mkdir(parents=True, exist_ok=True)
        marks = leavings.marks(order.id, order.round)
        write_tensors(leavings.prepared, {"round": torch.tensor(float(order.round))}, marks)
        return await perform(order, on_progress)

    monkeypatch.setattr(world.group, "perform", leaving)
    daemon = world.daemon()
    await world.attached()
    spec = world.spec_json(local=SCAFFOLD)
    told = [(1, 0), (2, 1), (3, 1), (4, 3), (5, None)]  # round 2 fails, and is made anew without this site
    for count, (round_, counted) in enumerate(told, start=1):
        name = f"r{round_}"
        message = world.assignment(name, round=round_, spec_json=spec, counted_round=counted)
        world.coordinator.assign(message)
        await world.coordinator.until(lambda n=name: n in world.coordinator.receipts)
        await world.until(lambda: not leavings.prepared.exists())
        if restarts:
            await world.stop(daemon)
            daemon = world.daemon()
            await world.attached(count + 1)
    assert begins_from == [0, 1, 1, 3, 4]
