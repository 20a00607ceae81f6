"""Which assignment is done when: one at a time unless the site says otherwise, each run in its order."""

import asyncio
from pathlib import Path
from typing import Any

from fedloom.v1 import session_pb2 as pb


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


async def test_a_site_that_says_so_works_for_two_runs_at_once_but_for_each_on_one_thing(world: Any) -> None:
    world.group.gate.clear()
    world.daemon(concurrent_assignments=2)
    await world.attached()
    for name, run_id in (("a1", "a"), ("a2", "a"), ("b1", "b"), ("c1", "c")):
        world.coordinator.assign(world.assignment(name, run_id=run_id))
    await world.until(lambda: len(world.group.orders) >= 2)
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
    await world.until(lambda: len(world.group.orders) == 1)
    world.coordinator.assign(world.assignment("b1", run_id="b", model=other))
    await world.until(lambda: len(world.group.orders) == 2)
    assert all(Path(order.model_path).exists() for order in world.group.orders)
    world.group.gate.set()
    await world.coordinator.until(lambda: len(world.coordinator.receipts) == 2)


async def test_a_cancelled_assignment_that_waits_is_never_begun(world: Any) -> None:
    world.group.gate.clear()
    world.daemon()
    await world.attached()
    for name in ("one", "two"):
        world.coordinator.assign(world.assignment(name, work=pb.WORK_EVALUATE))
    await world.group.started.wait()
    world.coordinator.send(cancel=pb.Cancel(assignment_id="two", reason="not wanted"))
    world.coordinator.assign(world.assignment("three", work=pb.WORK_EVALUATE))
    await world.coordinator.until(
        lambda: "three" in [told.assignment_id for told in world.coordinator.kinds("progress")]
    )
    world.group.gate.set()
    await world.coordinator.until_heard("outcome", 2)
    assert [order.id for order in world.group.orders] == ["one", "three"]


async def test_while_the_coordinator_drains_nothing_new_begins(world: Any) -> None:
    world.daemon()
    await world.coordinator.until_heard("heartbeat")
    world.coordinator.send(drain=pb.Drain(reason="shutdown"))
    world.coordinator.assign(world.assignment())
    await asyncio.sleep(0.3)
    assert world.group.orders == []
    world.coordinator.break_session()
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
