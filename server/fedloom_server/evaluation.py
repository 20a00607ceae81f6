"""What the sites measured, as one number a metric."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedloom_common.errors import TooFewUpdates

_MEAN_OVER_TOKENS = frozenset({"loss"})


@dataclass(frozen=True, kw_only=True)
class SiteMetrics:
    """What one site measured, and on how much data."""

    examples: int
    tokens: int
    metrics: Mapping[str, float]


def combine(results: Iterable[SiteMetrics]) -> dict[str, float]:
    """Metrics over all sites' data, as if it lay in one place, in the order of their names.

    The loss is a mean over tokens, and perplexity is its exponential: a mean
    of perplexities would be larger. Any other metric is a mean over examples,
    at the sites that report it. A metric that stands for no data is left out.

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
    return combined


def _mean(name: str, results: list[SiteMetrics]) -> float | None:
    """Weighted mean of one metric; None if its weights add up to nothing."""
    pairs = [(_weight(name, result), result.metrics[name]) for result in results if name in result.metrics]
    total = sum(weight for weight, _ in pairs)
    return sum(weight / total * value for weight, value in pairs) if total > 0 else None


def _weight(name: str, result: SiteMetrics) -> int:
    return result.tokens if name in _MEAN_OVER_TOKENS else result.examples


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
