"""What the sites measured, as one number a metric."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedloom_common.errors import TooFewUpdates
from fedloom_common.scores import macro_f1
from fedloom_server.records import Assignment

_MEAN_OVER_TOKENS = frozenset({"loss"})
_COUNTED = ("hits", "predicted", "actual")


@dataclass(frozen=True, kw_only=True)
class SiteMetrics:
    """What one site measured, and on how much data."""

    examples: int
    tokens: int
    metrics: Mapping[str, float]
    weights: Mapping[str, int] = field(default_factory=dict)
    """How many things a metric is the mean of, where that is told."""
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Counts by label."""


def metrics_of(assignment: Assignment) -> SiteMetrics:
    """What came of a finished assignment."""
    return SiteMetrics(
        examples=assignment.examples,
        tokens=assignment.tokens,
        metrics=assignment.metrics,
        weights=assignment.metric_weights,
        counts=assignment.metric_counts,
    )


def before_of(assignment: Assignment) -> SiteMetrics | None:
    """What a site measured of the model that it started from; None if it did not."""
    return SiteMetrics(**assignment.base_measured) if assignment.base_measured else None


def combined(done: Iterable[Assignment]) -> dict[str, float]:
    """What came of finished assignments, over all sites' data.

    Raises:
        TooFewUpdates: there are none.
    """
    return combine(metrics_of(assignment) for assignment in done)


def combine(results: Iterable[SiteMetrics]) -> dict[str, float]:
    """Metrics over all sites' data, as if it lay in one place, in the order of their names.

    A metric is a mean, weighted by how many things each site's is the mean
    of: what the site says, else tokens for the loss and examples for any
    other; over the sites that report it. Two are no means: perplexity is the
    exponential of the loss, and macro F1 is that of all sites' counts. A
    metric that stands for no data is left out.

    Raises:
        TooFewUpdates: no site has reported.
    """
    reported = list(results)
    if not reported:
        raise TooFewUpdates("no site has reported: there are no metrics to combine")
    names = sorted({name for result in reported for name in result.metrics})
    combined = {name: mean for name in names if (mean := _mean(name, reported)) is not None}
    if "perplexity" in combined and "loss" in combined:
        combined["perplexity"] = _exp(combined["loss"])
    if "macro_f1" in combined and (counts := _added(reported)):
        combined["macro_f1"] = macro_f1(*counts)
    return combined


def _added(results: Sequence[SiteMetrics]) -> list[list[int]] | None:
    """Each of the counts by label, over the sites; None if a site lacks them, or has other labels."""
    lengths = {len(result.counts.get(name, ())) for result in results for name in _COUNTED}
    if len(lengths) != 1 or lengths == {0}:
        return None
    return [
        [sum(column) for column in zip(*(result.counts[name] for result in results), strict=True)]
        for name in _COUNTED
    ]


def _mean(name: str, results: Sequence[SiteMetrics]) -> float | None:
    """Weighted mean of one metric; None if its weights add up to nothing."""
    pairs = [(_weight(name, result), result.metrics[name]) for result in results if name in result.metrics]
    total = sum(weight for weight, _ in pairs)
    return sum(weight / total * value for weight, value in pairs) if total > 0 else None


def _weight(name: str, result: SiteMetrics) -> int:
    return result.weights.get(name, result.tokens if name in _MEAN_OVER_TOKENS else result.examples)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
