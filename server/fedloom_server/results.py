"""What a site says of its finished work, and what may be wrong with that."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedloom_common.digests import DIGEST, is_digest
from fedloom_common.runspec import RunSpec
from fedloom_server.records import Assignment, Work

LARGEST_COUNT = 1 << 53  # beyond it a count is no longer exact as a float, nor ever honest


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a site says of its finished work."""

    examples: int
    tokens: int
    metrics: Mapping[str, float]
    phase_seconds: Mapping[str, float]
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
