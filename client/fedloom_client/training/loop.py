"""The loop: what a rank does in a round, and how the global model is measured. Start reading here."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fedloom_client.training.checkpoints import Checkpoint
from fedloom_client.training.data import Blocks
from fedloom_client.training.group import Group
from fedloom_client.training.optimizers import rate_factor
from fedloom_client.training.orders import WorkerProgress
from fedloom_client.training.plan import ExampleStream, RoundPlan
from fedloom_client.training.pulse import Pulse, TrainProgress
from fedloom_client.training.roundalgorithm import RoundAlgorithm
from fedloom_client.training.tasks import Task
from fedloom_common.runspec import Local


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What the loop needs of the rank that it runs on."""

    group: Group
    model: nn.Module
    """The model, wrapped in DDP if there are several ranks."""
    task: Task
    precision: torch.dtype | None
    """Type of autocast; None for none."""
    report: Callable[[WorkerProgress], None]
    stop_wanted: Callable[[], bool]

    def autocast(self) -> AbstractContextManager[None]:
        """The forward pass's number format."""
        return torch.autocast(self.group.device.type, self.precision, enabled=self.precision is not None)

    def batch(self, blocks: Blocks, numbers: np.ndarray) -> torch.Tensor:
        """Examples on the rank's device: [examples, tokens], int64."""
        return torch.from_numpy(blocks[numbers].astype(np.int64)).to(self.group.device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a rank takes a round's steps with."""

    plan: RoundPlan
    stream: ExampleStream
    optimizer: torch.optim.Optimizer
    algorithm: RoundAlgorithm
    checkpoint: Checkpoint
    earlier: list[float]
    """Losses of the round's first steps, if a checkpoint told of them."""


def train(rank: Rank, local: Local, blocks: Blocks, course: Course) -> float:
    """Take the round's steps; the mean loss over them and all ranks.

    One step over W ranks is one step of a single process on the same examples: DDP averages the
    ranks' gradients, and every rank's share has the same number of targets.

    Raises:
        Cancelled, TrainingFailed: as ``Pulse.after``; the model and the optimizer are then unusable.
    """
    plan, stream, optimizer, done = course.plan, course.stream, course.optimizer, len(course.earlier)
    losses = torch.zeros(plan.steps, dtype=torch.float64, device=rank.group.device)
    pulse = Pulse(rank.group, losses, rank.stop_wanted, "the round", course.earlier)
    step_tokens = plan.step_examples * rank.task.targets(blocks.shape[1])
    progress = TrainProgress(rank.report, plan.steps, step_tokens, done=done)
    rank.model.train()
    for step in range(done, plan.steps):
        set_rate(optimizer, local, plan.first_rate_step + step, plan.total_steps)
        for part in range(plan.accumulation):
            examples = rank.batch(blocks, stream.take(plan.position(step, part), plan.micro_examples))
            with _sync_if(rank.model, part == plan.accumulation - 1):
                with rank.autocast():
                    loss = rank.task.loss(rank.model, examples) / plan.accumulation
                loss.backward()  # type: ignore[no-untyped-call]
            losses[step] += loss.detach() / rank.group.world
        course.algorithm.add_to_objective()
        if local.clip_norm is not None:
            nn.utils.clip_grad_norm_(rank.model.parameters(), local.clip_norm)
        course.algorithm.correct()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        is_checkpoint = step + 1 < plan.steps and course.checkpoint.is_due(step + 1)
        if pulse.after(step, is_due=is_checkpoint):
            progress.after(pulse.sums)
        if is_checkpoint:  # of finite losses only: the look has checked them
            course.checkpoint.save(pulse.sums)
    return sum(pulse.sums) / plan.steps


def evaluate(rank: Rank, module: nn.Module, blocks: Blocks, micro_examples: int) -> float:
    """Mean loss over held-out examples, every rank measuring a part of them.

    Raises:
        Cancelled, TrainingFailed: as ``Pulse.after``.
    """
    group, targets = rank.group, rank.task.targets(blocks.shape[1])
    mine = np.arange(group.rank, len(blocks), group.world)
    batches = -(-len(blocks) // (group.world * micro_examples))  # the same on every rank, for the pulse
    sums = torch.zeros(batches, dtype=torch.float64, device=group.device)
    pulse = Pulse(group, sums, rank.stop_wanted, "the evaluation")
    module.eval()
    for number in range(batches):
        part = mine[number * micro_examples : (number + 1) * micro_examples]
        if len(part):
            with torch.no_grad(), rank.autocast():
                sums[number] = rank.task.loss(module, rank.batch(blocks, part)) * (len(part) * targets)
        if pulse.after(number):
            rank.report(WorkerProgress(phase="evaluate", done=number + 1, total=batches))
    return sum(pulse.sums) / (len(blocks) * targets)


def set_rate(optimizer: torch.optim.Optimizer, local: Local, step: int, total_steps: int) -> None:
    """Set the learning rate of a step of the run."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = local.optimizer.lr * rate_factor(local.schedule, step, total_steps)


def _sync_if(model: nn.Module, last_part: bool) -> AbstractContextManager[None]:
    """Gradients are averaged over the ranks once a step, with its last part."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last_part else nullcontext()
