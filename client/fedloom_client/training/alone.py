"""Training alone: what a site's own data make of the initial model, to compare the federation's with."""

import math
from collections.abc import Callable
from dataclasses import replace

from fedloom_client.training.orders import WorkerProgress, WorkerResult
from fedloom_common.runspec import RunSpec


def is_measured_after(spec: RunSpec, round_: int, rounds: int) -> bool:
    """Whether to measure after a round's steps: where the run measures its models, and at the end."""
    every = spec.evaluation.every_rounds
    return round_ == rounds or (every > 0 and round_ % every == 0)


def better(spec: RunSpec, one: WorkerResult | None, other: WorkerResult) -> WorkerResult:
    """The better of two measurements by what the run's models are judged by, or by the loss if it lacks that.

    A site that trains alone would keep its best model too.
    """
    goal = spec.own_goal
    name, sign = goal.metric, -1 if goal.higher_is_better else 1
    if name not in other.metrics:
        name, sign = "loss", 1
    if one is None or not math.isfinite(one.metrics.get(name, math.nan)):
        return other
    return other if sign * other.metrics[name] < sign * one.metrics[name] else one


def told_on(
    report: Callable[[WorkerProgress], None], steps_before: int, total_steps: int
) -> Callable[[WorkerProgress], None]:
    """Report the steps of a round as part of all steps."""

    def tell(progress: WorkerProgress) -> None:
        if progress.phase == "train":
            progress = replace(progress, done=steps_before + progress.done, total=total_steps)
        report(progress)

    return tell
