"""Which examples a rank sees at which step of a run, as a function of the round alone."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import Local


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """The steps of one round on one rank."""

    steps: int
    first_step: int
    """Number of the round's first step in the site's stream of examples, from 0."""
    first_rate_step: int
    """Number of the round's first step in the learning rate's schedule, from 0."""
    total_steps: int
    """Steps of the whole run, if it goes to its last round."""
    accumulation: int
    micro_examples: int
    """Examples that a rank takes at once; ``accumulation`` times that is its share of a step."""
    step_examples: int
    """Examples of one optimizer step over all ranks."""

    def position(self, step: int, part: int) -> int:
        """Where in its endless stream of examples a rank is, at a part of a step of this round."""
        return ((self.first_step + step) * self.accumulation + part) * self.micro_examples


def plan_round(
    local: Local,
    *,
    round: int,  # noqa: A002
    rounds: int,
    train_examples: int,
    world: int,
    schedule_round: int = 0,
) -> RoundPlan:
    """Lay out a round; ``schedule_round`` is where the learning rate's schedule stands, if not at ``round``.

    Raises:
        TrainingFailed: the batch cannot be shared evenly, or there are fewer examples than ranks.
    """
    parts = world * local.accumulation_steps
    if local.batch_examples % parts:
        raise TrainingFailed(
            f"batch_examples is {local.batch_examples}, which this site's {world} ranks with "
            f"{local.accumulation_steps} accumulation steps cannot share evenly: make it a multiple of "
            f"{parts}, or change the site's workers"
        )
    if train_examples < world:
        raise TrainingFailed(
            f"the site's texts make {train_examples} training examples, too few for {world} ranks: add "
            "texts, or lower context_tokens"
        )
    if local.steps is None:
        assert local.epochs is not None
        exact = local.epochs * train_examples / local.batch_examples
        steps = max(1, math.ceil(exact - 1e-9))  # a product that should be whole may come out a hair above
    else:
        steps = local.steps
    return RoundPlan(
        steps=steps,
        first_step=(round - 1) * steps,
        first_rate_step=((schedule_round or round) - 1) * steps,
        total_steps=rounds * steps,
        accumulation=local.accumulation_steps,
        micro_examples=local.batch_examples // parts,
        step_examples=local.batch_examples,
    )


class ExampleStream:
    """One rank's endless stream of example numbers: a DistributedSampler's epochs, one after the other."""

    def __init__(self, examples: int, *, seed: int, rank: int, world: int) -> None:
        self._sampler: DistributedSampler[int] = DistributedSampler(
            range(examples),  # type: ignore[arg-type]  # only its length is used
            num_replicas=world,
            rank=rank,
            shuffle=True,
            seed=seed,
            drop_last=True,
        )
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def take(self, position: int, number: int) -> NDArray[np.int64]:
        """The numbers at ``number`` places from ``position`` on."""
        taken: list[NDArray[np.int64]] = []
        while number > 0:
            epoch, offset = divmod(position, len(self._sampler))
            part = self._of_epoch(epoch)[offset : offset + number]
            taken.append(part)
            position, number = position + len(part), number - len(part)
        return np.concatenate(taken)

    def _of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._sampler.set_epoch(epoch)
            self._order, self._epoch = np.fromiter(self._sampler, np.int64), epoch
        return self._order
