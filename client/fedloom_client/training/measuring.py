"""How the global model is measured on held-out examples."""

from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
from torch import nn

from fedloom_client.training.examples import Examples, spread
from fedloom_client.training.orders import WorkerProgress
from fedloom_client.training.pulse import Pulse
from fedloom_client.training.ranks import MEASURING, Batch, Rank
from fedloom_client.training.tasks import Measured, Sums
from fedloom_common.errors import TrainingFailed


class NothingToMeasure(TrainingFailed):
    """A site has no held-out examples, or they have no targets."""


def evaluate(
    rank: Rank, module: nn.Module, examples: Examples, numbers: np.ndarray, micro_examples: int
) -> tuple[Measured, int]:
    """The task's metrics over some held-out examples, every rank measuring a part of them; their targets.

    Raises:
        NothingToMeasure: the examples have no targets.
        Cancelled, TrainingFailed: as ``Pulse.after``.
    """
    task = rank.task
    module.eval()

    def measure(batch: Batch) -> Sums:
        return dict(task.measure(module, batch.inputs)) | {"targets": torch.tensor(batch.targets)}

    sums = _over(rank, examples, numbers, micro_examples, measure)
    targets = int(sums.pop("targets")[0])
    if not targets:
        raise NothingToMeasure(
            f"of the site's {len(numbers)} held-out examples none has anything to predict: "
            "add some, or raise the data set's held_out"
        )
    if task.sampled_examples:
        some = numbers[spread(len(numbers), task.sampled_examples)]
        sums |= _over(rank, examples, some, micro_examples, lambda batch: task.sample(module, batch.inputs))
        sums["sampled"] = [float(len(some))]
    return task.metrics(sums, targets), targets


def _over(
    rank: Rank, examples: Examples, numbers: np.ndarray, micro_examples: int, measure: Callable[[Batch], Sums]
) -> dict[str, list[float]]:
    """Sums over examples and ranks.

    Every rank measures as many batches as the others, one that has no more examples some that do not count:
    sharded models need all ranks in every forward pass.
    """
    group = rank.group
    mine = numbers[group.rank :: group.world]
    batches = -(-len(numbers) // (group.world * micro_examples))
    losses = torch.zeros(batches, dtype=torch.float64, device=group.device)
    pulse = Pulse(group, losses, rank.stop_wanted, "the evaluation")
    totals: dict[str, torch.Tensor] = {}
    for number in range(batches):
        part = mine[number * micro_examples : (number + 1) * micro_examples]
        batch = rank.batch(examples, part if len(part) else numbers[:1], MEASURING)
        with torch.no_grad(), rank.autocast():
            sums = measure(batch)
        for name, value in sums.items():
            value = value.to(group.device, torch.float64).reshape(-1) * bool(len(part))
            totals[name] = totals[name] + value if name in totals else value
        if "loss" in sums and len(part):
            losses[number] = sums["loss"]
        if pulse.after(number):
            rank.report(WorkerProgress(phase="evaluate", done=number + 1, total=batches))
    together = iter(group.sum(torch.cat(list(totals.values()))).tolist())
    return {name: list(islice(together, len(value))) for name, value in totals.items()}
