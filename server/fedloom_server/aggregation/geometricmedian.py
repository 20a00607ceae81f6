"""The geometric median of the updates, by the smoothed Weiszfeld algorithm on inner products alone."""

from collections.abc import Sequence

import numpy as np

from fedloom_common.runspec import GeometricMedianRule
from fedloom_server.aggregation.output import Values

SETTLED = (
    1e-10  # largest relative change of a share with which the algorithm ends: far updates have tiny ones
)


def geometric_median_shares(gram: Values, examples: Sequence[int], rule: GeometricMedianRule) -> Values:
    """Shares pₖ with  Σ pₖ θₖ ≈ argmin_z Σ αₖ ‖z − θₖ‖,  where αₖ = nₖ/n, or 1/n if unweighted.

    Each step takes  pₖ ∝ αₖ / max(ν, ‖z − θₖ‖)  at the z of the step before, beginning at the mean. With
    z = Σ pₖ θₖ the squared distances are  pᵀGp − 2(Gp)ₖ + Gₖₖ,  so that no step reads an update again.

    Source: Pillutla et al. 2019, arXiv:1912.13445, algorithm 2.
    """
    weights: Values = np.array(examples, np.float64) if rule.weighted else np.ones(len(gram))
    weights /= weights.sum()
    shares: Values = weights
    for _ in range(rule.iterations):
        before = shares
        pulls = weights / np.maximum(rule.smoothing, _distances(gram, shares))
        shares = pulls / pulls.sum()
        if (np.abs(shares - before) <= SETTLED * before).all():
            break
    return shares


def _distances(gram: Values, shares: Values) -> Values:
    products = gram @ shares
    squares = shares @ products - 2 * products + np.diag(gram)
    distances: Values = np.sqrt(np.maximum(squares, 0))
    return distances
