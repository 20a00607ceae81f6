"""Which examples a round sees, for one rank and for several."""

import numpy as np
import pytest

from fedloom_client.training.plan import ExampleStream, plan_round
from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import Local


def global_batches(world: int, rounds: range, local: Local, examples: int) -> list[set[int]]:
    """The examples of every step of some rounds, over all ranks."""
    streams = [ExampleStream(examples, seed=5, rank=rank, world=world) for rank in range(world)]
    batches = []
    for round_ in rounds:
        plan = plan_round(local, round=round_, rounds=10, train_examples=examples, world=world)
        for step in range(plan.steps):
            batch = [
                number
                for stream in streams
                for part in range(plan.accumulation)
                for number in stream.take(plan.position(step, part), plan.micro_examples)
            ]
            assert len(batch) == local.batch_examples
            batches.append(set(batch))
    return batches


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 4), (4, 2)])
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(world: int, accumulation: int) -> None:
    alone = Local(steps=5, batch_examples=8)
    shared = Local(steps=5, batch_examples=8, accumulation_steps=accumulation)
    assert global_batches(world, range(1, 4), shared, 80) == global_batches(1, range(1, 4), alone, 80)


def test_a_round_goes_on_where_the_one_before_ended_and_an_epoch_sees_every_example_once() -> None:
    batches = global_batches(2, range(1, 5), Local(steps=5, batch_examples=4), 40)
    assert set.union(*batches[:10]) == set(range(40))
    assert set.union(*batches[10:]) == set(range(40))
    assert batches[:10] != batches[10:]


def test_a_step_may_span_epochs() -> None:
    stream = ExampleStream(7, seed=0, rank=0, world=1)
    taken = stream.take(5, 18)
    assert len(taken) == 18
    assert sorted(taken[2:9]) == list(range(7))
    np.testing.assert_array_equal(stream.take(8, 3), taken[3:6])


@pytest.mark.parametrize(
    ("epochs", "examples", "steps"), [(1, 64, 2), (1, 65, 3), (0.5, 64, 1), (0.01, 64, 1), (3, 100, 10)]
)
def test_epochs_become_steps(epochs: float, examples: int, steps: int) -> None:
    plan = plan_round(
        Local(epochs=epochs, batch_examples=32), round=3, rounds=10, train_examples=examples, world=2
    )
    assert (plan.steps, plan.first_step, plan.total_steps) == (steps, 2 * steps, 10 * steps)


def test_a_schedule_that_stands_elsewhere_moves_the_rate_and_not_the_examples() -> None:
    local = Local(steps=5, batch_examples=4)
    usual = plan_round(local, round=7, rounds=10, train_examples=100, world=1)
    ahead = plan_round(local, round=7, rounds=10, train_examples=100, world=1, schedule_round=9)
    assert (usual.first_step, usual.first_rate_step) == (30, 30)
    assert (ahead.first_step, ahead.first_rate_step) == (30, 40)
    assert ahead.position(0, 0) == usual.position(0, 0)


def test_a_batch_that_the_ranks_cannot_share_says_what_to_change() -> None:
    with pytest.raises(TrainingFailed, match=r"batch_examples is 8.*3 ranks.*multiple of 6"):
        plan_round(
            Local(steps=1, batch_examples=8, accumulation_steps=2),
            round=1, rounds=1, train_examples=100, world=3,
        )  # fmt: skip


def test_fewer_examples_than_ranks_says_what_to_change() -> None:
    with pytest.raises(TrainingFailed, match="1 training examples, too few for 2 ranks: add texts"):
        plan_round(Local(steps=1, batch_examples=2), round=1, rounds=1, train_examples=1, world=2)
