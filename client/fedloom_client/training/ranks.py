"""One rank's place in the work: the model, the task, and batches on the rank's device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedloom_client.training.examples import Examples
from fedloom_client.training.group import Group
from fedloom_client.training.orders import WorkerProgress
from fedloom_client.training.tasks import Inputs, Task

TRAINING, MEASURING = 1, 0  # randomness of the one never depends on that of the other


@dataclass(frozen=True)
class Batch:
    """What a rank takes at once."""

    inputs: Inputs
    targets: int


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What the loop needs of the rank that it runs on."""

    group: Group
    model: nn.Module
    task: Task
    seed: int
    """The run's."""
    precision: torch.dtype | None
    """Type of autocast; None for none."""
    report: Callable[[WorkerProgress], None]
    stop_wanted: Callable[[], bool]

    def autocast(self) -> AbstractContextManager[None]:
        """The forward pass's number format."""
        return torch.autocast(self.group.device.type, self.precision, enabled=self.precision is not None)

    def batch(self, examples: Examples, numbers: np.ndarray, *moment: int) -> Batch:
        """Examples on the rank's device.

        What a task draws for an example follows from the run's seed, the moment and the example's number
        alone, so that neither the number of ranks nor a checkpoint makes a difference.
        """
        arrays = examples.take(numbers, self.task.padding)
        arrays = self.task.batch(arrays, self._generators(moment, numbers))
        inputs = {
            name: torch.from_numpy(values.astype(np.int64)).to(self.group.device, non_blocking=True)
            for name, values in arrays.items()
        }
        return Batch(inputs, self.task.targets(arrays))

    def step_targets(self, batches: Sequence[Batch]) -> int:
        """Targets of an optimizer step over all ranks; the batches are this rank's parts of it."""
        mine = sum(batch.targets for batch in batches)
        if self.task.is_even or self.group.world == 1:
            return mine * self.group.world
        return int(self.group.sum(torch.tensor([mine], device=self.group.device)).item())

    def _generators(self, moment: Sequence[int], numbers: np.ndarray) -> Iterator[np.random.Generator]:
        return (np.random.default_rng([self.seed, *moment, number]) for number in numbers.tolist())
