"""The loop: what a rank does in a round. Start reading here."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fedloom_client.training.checkpoints import Checkpoint
from fedloom_client.training.examples import Examples
from fedloom_client.training.optimizers import rate_factor
from fedloom_client.training.plan import ExampleStream, RoundPlan
from fedloom_client.training.pulse import Pulse, TrainProgress
from fedloom_client.training.ranks import TRAINING, Batch, Rank
from fedloom_client.training.roundalgorithm import RoundAlgorithm
from fedloom_client.training.sharding import local as own_part
from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import Local


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a rank takes a round's steps with."""

    plan: RoundPlan
    loss: nn.Module
    """Takes a batch to its mean loss; wrapped in DDP if there are several ranks."""
    stream: ExampleStream
    optimizer: torch.optim.Optimizer
    algorithm: RoundAlgorithm
    checkpoint: Checkpoint
    earlier: list[float]
    """Losses of the round's first steps, if a checkpoint told of them."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a round's steps."""

    loss: float
    """Mean over the steps of their mean loss over all ranks."""
    targets: int
    """Over all steps and ranks, also those before a checkpoint."""


def train(rank: Rank, local: Local, examples: Examples, course: Course) -> "Trained":
    """Take the round's steps.

    One step over W ranks is one step of a single process on the same examples: DDP averages the
    ranks' gradients, and every part of the step counts by its share of the step's targets.

    Raises:
        Cancelled, TrainingFailed: as ``Pulse.after``, or a weight is not finite at the end; the model and
            the optimizer are then unusable.
    """
    plan, optimizer, done = course.plan, course.optimizer, len(course.earlier)
    losses = torch.zeros(plan.steps, dtype=torch.float64, device=rank.group.device)
    pulse = Pulse(rank.group, losses, rank.stop_wanted, "the round", course.earlier)
    targets = sum(rank.step_targets(_parts(rank, examples, course, step)) for step in range(done))
    progress = TrainProgress(rank.report, plan.steps, done=done, targets=targets)
    rank.model.train()
    for step in range(done, plan.steps):
        set_rate(optimizer, local, plan.first_rate_step + step, plan.total_steps)
        batches = _parts(rank, examples, course, step)
        step_targets = rank.step_targets(batches)
        for part, batch in enumerate(batches):
            share = batch.targets * rank.group.world / max(step_targets, 1)
            with _sync_if(course.loss, part == plan.accumulation - 1):
                with rank.autocast():
                    loss = course.loss(batch.inputs) * share
                loss.backward()
            losses[step] += loss.detach() / rank.group.world
        course.algorithm.add_to_objective()
        if local.clip_norm is not None:
            nn.utils.clip_grad_norm_(rank.model.parameters(), local.clip_norm)
        course.algorithm.correct()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        targets += step_targets
        is_checkpoint = step + 1 < plan.steps and course.checkpoint.is_due(step + 1)
        if pulse.after(step, is_due=is_checkpoint):
            progress.after(pulse.sums, targets)
        if is_checkpoint:  # of finite losses only: the look has checked them
            course.checkpoint.save(pulse.sums)
    _require_finite(rank, plan.steps)
    return Trained(loss=sum(pulse.sums) / plan.steps, targets=targets)


def set_rate(optimizer: torch.optim.Optimizer, local: Local, step: int, total_steps: int) -> None:
    """Set the learning rate of a step of the run."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = local.optimizer.lr * rate_factor(local.schedule, step, total_steps)


def _require_finite(rank: Rank, steps: int) -> None:
    """Check the weights on all ranks together: no loss tells what the last step has made of them."""
    own = (own_part(tensor.detach()) for tensor in rank.model.parameters() if tensor.requires_grad)
    unfit = torch.zeros(1, device=rank.group.device)
    for tensor in own:
        if tensor.numel():  # of few rows a rank may have none
            for end in tensor.aminmax():  # both are NaN where any value is; needs no memory, unlike isfinite
                unfit += ~end.isfinite()
    if rank.group.sum(unfit).item():
        raise TrainingFailed(
            f"the weights are not finite after step {steps} of {steps} of the round: lower the learning "
            "rate, or set clip_norm"
        )


def _parts(rank: Rank, examples: Examples, course: Course, step: int) -> list[Batch]:
    """This rank's batches of a step."""
    plan = course.plan
    return [
        rank.batch(
            examples,
            course.stream.take(plan.position(step, part), plan.micro_examples),
            TRAINING,
            plan.first_step + step,
        )
        for part in range(plan.accumulation)
    ]


def _sync_if(loss: nn.Module, last_part: bool) -> AbstractContextManager[None]:
    """Gradients are averaged over the ranks once a step, with its last part."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) and not last_part else nullcontext()
