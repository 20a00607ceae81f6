"""What a site says of its finished work, and what may be wrong with that."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedloom_common.digests import DIGEST, is_digest
from fedloom_common.runspec import RunSpec, Task
from fedloom_common.runspec.evaluation import CENTRAL_PREFIX, TRAIN_PREFIX
from fedloom_common.runspec.tasks import MOST_LABELS
from fedloom_server.evaluation import SiteMetrics
from fedloom_server.records import Assignment, Work

LARGEST_RATIO = 64  # bytes of text that a token, or a byte of a compressed file, may stand for
LARGEST_COUNT = 1 << 53  # beyond it a count is no longer exact as a float, nor ever honest
OWN_PREFIXES = (CENTRAL_PREFIX, TRAIN_PREFIX)
"""Begin names of a round's metrics that the coordinator makes; a site would speak for others by them."""


@dataclass(frozen=True, kw_only=True)
class Result(SiteMetrics):
    """What a site says of its finished work."""

    phase_seconds: Mapping[str, float]
    update_digest: str = ""
    update_bytes: int = 0
    before: SiteMetrics | None = None
    """What it measured of the model that it started from."""
    data_examples: int = 0
    """Training examples that its data set makes."""


def objection(
    result: Result, assignment: Assignment, spec: RunSpec, *, most_update_bytes: int, data_bytes: int
) -> str | None:
    """What is wrong with a result; None if nothing is. ``data_bytes`` is the size of the site's data set."""
    wrong = _objection_to_numbers(result, spec, data_bytes)
    if assignment.work is Work.TRAIN:
        wrong = wrong or _objection_to_update(result, assignment, spec, most_update_bytes)
    else:
        wrong = wrong or _objection_to_held_out(result, spec, data_bytes)
    if result.before is not None and assignment.measures:
        before = _objection_to_numbers(result.before, spec, data_bytes)
        before = before or _objection_to_held_out(result.before, spec, data_bytes)
        wrong = wrong or (before and f"of the model that it began from {before}")
    if result.data_examples > LARGEST_COUNT:
        wrong = wrong or f"it claims that its data make {result.data_examples} examples"
    return wrong


def _objection_to_numbers(told: SiteMetrics, spec: RunSpec, data_bytes: int) -> str | None:
    if not 0 < told.examples <= LARGEST_COUNT:
        return f"it claims {told.examples} examples, wanted a positive number"
    most_tokens = min(told.examples * spec.task.most_targets, LARGEST_COUNT)
    if not 0 <= told.tokens <= most_tokens:
        return f"it claims {told.tokens} tokens, {told.examples} examples have at most {most_tokens}"
    wrong = [name for name, value in told.metrics.items() if not math.isfinite(value)]
    if wrong:
        return f"its metric {wrong[0]} is {told.metrics[wrong[0]]}, wanted a finite number"
    wrong = [name for name in told.metrics if name.startswith(OWN_PREFIXES)]
    if wrong:
        return f"its metric is called {wrong[0]}, names that begin so are the coordinator's own"
    return _objection_to_weights(told, data_bytes)


def _objection_to_held_out(told: SiteMetrics, spec: RunSpec, data_bytes: int) -> str | None:
    most = min(spec.evaluation.max_examples or data_bytes, data_bytes)
    return None if told.examples <= most else f"it claims {told.examples} examples of at most {most}"


def _objection_to_update(
    result: Result, assignment: Assignment, spec: RunSpec, most_update_bytes: int
) -> str | None:
    if spec.task.weighs == "tokens" and not result.tokens:
        return "it claims no tokens to have trained on, which are what its update would count by"
    if not is_digest(result.update_digest):
        return f"its update's digest is {result.update_digest[:100]!r}, wanted {DIGEST}"
    if spec.local.steps is not None and result.examples > spec.local.steps * spec.local.batch_examples:
        most = spec.local.steps * spec.local.batch_examples
        return f"it claims {result.examples} examples, {spec.local.steps} steps use at most {most}"
    heaviest, claimed = spec.aggregation.max_examples, update_weight(spec.task, result)
    if heaviest is not None and claimed > heaviest:
        return f"it claims {claimed} {spec.task.weighs}, aggregation.max_examples is {heaviest}"
    if not 8 < result.update_bytes <= most_update_bytes:
        return (
            f"its update has {result.update_bytes} bytes, the model has {assignment.model_bytes} and "
            f"transport.up makes at most {most_update_bytes} of it"
        )
    return None


def update_weight(task: Task, trained: Assignment | Result) -> int:
    """nₖ: what an update counts in a weighted mean."""
    return trained.tokens if task.weighs == "tokens" else trained.examples


def _objection_to_weights(told: SiteMetrics, data_bytes: int) -> str | None:
    """What is wrong with what metrics are means of: nobody may measure more than there is."""
    most = max(told.examples, told.tokens)
    for name, weight in told.weights.items():
        if weight > LARGEST_RATIO * max(most, data_bytes):
            return f"its metric {name} is the mean of {weight} things, it has measured {most} targets"
    for name, counts in told.counts.items():
        if len(counts) > MOST_LABELS:
            return f"its {name} are counts of {len(counts)} labels, wanted at most {MOST_LABELS}"
        if sum(counts) > most:
            return f"its {name} are counts of {sum(counts)} things, it has measured {most} targets"
    return None
