"""What a site says of its finished work, and what may be wrong with that."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedloom_common.digests import DIGEST, is_digest
from fedloom_common.runspec import RunSpec, Task
from fedloom_common.runspec.tasks import MOST_LABELS
from fedloom_server.records import Assignment, Work

LARGEST_COUNT = 1 << 53  # beyond it a count is no longer exact as a float, nor ever honest


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a site says of its finished work."""

    examples: int
    tokens: int
    metrics: Mapping[str, float]
    phase_seconds: Mapping[str, float]
    weights: Mapping[str, int] = field(default_factory=dict)
    """How many things a metric is the mean of."""
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Counts that add up over sites."""
    update_digest: str = ""
    update_bytes: int = 0


def objection(
    result: Result, assignment: Assignment, spec: RunSpec, *, most_update_bytes: int, data_bytes: int
) -> str | None:
    """What is wrong with a result; None if nothing is. ``data_bytes`` is the size of the site's data set."""
    if not 0 < result.examples <= LARGEST_COUNT:
        return f"it claims {result.examples} examples, wanted a positive number"
    most_tokens = min(result.examples * spec.task.most_targets, LARGEST_COUNT)
    if not 0 <= result.tokens <= most_tokens:
        return f"it claims {result.tokens} tokens, {result.examples} examples have at most {most_tokens}"
    wrong = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    if wrong:
        return f"its metric {wrong[0]} is {result.metrics[wrong[0]]}, wanted a finite number"
    if wrong_weights := _objection_to_weights(result, data_bytes):
        return wrong_weights
    if spec.task.weighs == "tokens" and assignment.work is Work.TRAIN and not result.tokens:
        return "it claims no tokens to have trained on, which are what its update would count by"
    if assignment.work is Work.EVALUATE:
        most = min(spec.evaluation.max_examples or data_bytes, data_bytes)
        return None if result.examples <= most else f"it claims {result.examples} examples of at most {most}"
    if not is_digest(result.update_digest):
        return f"its update's digest is {result.update_digest[:100]!r}, wanted {DIGEST}"
    if spec.local.steps is not None and result.examples > spec.local.steps * spec.local.batch_examples:
        most = spec.local.steps * spec.local.batch_examples
        return f"it claims {result.examples} examples, {spec.local.steps} steps use at most {most}"
    most_examples = spec.aggregation.max_examples
    if most_examples is not None and result.examples > most_examples:
        return f"it claims {result.examples} examples, aggregation.max_examples is {most_examples}"
    if not 8 < result.update_bytes <= most_update_bytes:
        return (
            f"its update has {result.update_bytes} bytes, the model has {assignment.model_bytes} and "
            f"transport.up makes at most {most_update_bytes} of it"
        )
    return None


def update_weight(task: Task, assignment: Assignment) -> int:
    """nₖ: what an update counts in a weighted mean."""
    return assignment.tokens if task.weighs == "tokens" else assignment.examples


def _objection_to_weights(result: Result, data_bytes: int) -> str | None:
    """What is wrong with what metrics are means of: nobody may measure more than there is."""
    most = max(result.examples, result.tokens)
    for name, weight in result.weights.items():
        if weight > max(most, 2 * data_bytes):
            return f"its metric {name} is the mean of {weight} things, it has measured {most} targets"
    for name, counts in result.counts.items():
        if len(counts) > MOST_LABELS:
            return f"its {name} are counts of {len(counts)} labels, wanted at most {MOST_LABELS}"
        if sum(counts) > most:
            return f"its {name} are counts of {sum(counts)} things, it has measured {most} targets"
    return None
