"""The geometric median of the updates, by the smoothed Weiszfeld algorithm on inner products alone."""

from collections.abc import Sequence

import numpy as np

from fedloom_common.runspec import GeometricMedianRule
from fedloom_server.aggregation.gram import squared_distances
from fedloom_server.aggregation.output import Values

# Largest relative change of a share with which the algorithm ends: far updates have tiny ones.
SETTLED = 1e-10


def geometric_median_shares(gram: Values, examples: Sequence[int], rule: GeometricMedianRule) -> Values:
    """Shares pₖ with  Σ pₖ θₖ ≈ argmin_z Σ αₖ ‖z − θₖ‖,  where αₖ = nₖ/n, or 1/n if unweighted.

    Each step takes  pₖ ∝ αₖ / max(ν, ‖z − θₖ‖)  at the z of the step before. With z = Σ pₖ θₖ the squared
    distances are  pᵀGp − 2(Gp)ₖ + Gₖₖ,  so that no step reads an update again. It begins near the update that
    is nearest to all others, and not at the mean, which a bad update draws as far away as it likes: the steps
    back would not end.

    Source: Pillutla et al. 2019, arXiv:1912.13445, algorithm 2.
    """
    weights: Values = np.array(examples, np.float64) if rule.weighted else np.ones(len(gram))
    weights /= weights.sum()
    shares = _near_medoid(gram, weights, rule.smoothing)
    for _ in range(rule.iterations):
        before = shares
        pulls = weights / np.maximum(rule.smoothing, _distances(gram, shares))
        shares = pulls / pulls.sum()
        if (np.abs(shares - before) <= SETTLED * before).all():
            break
    return shares


def _near_medoid(gram: Values, weights: Values, smoothing: float) -> Values:
    """Shares of a place beside the update with the least sum of distances to all, and not at it: of two that
    are alike no step would lead away. It is about as far off as half of the weight lies.
    """
    distances = np.sqrt(squared_distances(gram))
    near = distances[np.argmin(distances @ weights)]
    nearest_first = np.argsort(near)
    half = near[nearest_first[np.searchsorted(np.cumsum(weights[nearest_first]), 0.5)]]
    pulls = weights / np.maximum(smoothing, near + half)
    shares: Values = pulls / pulls.sum()
    return shares


def _distances(gram: Values, shares: Values) -> Values:
    products = gram @ shares
    squares = shares @ products - 2 * products + np.diag(gram)
    distances: Values = np.sqrt(np.maximum(squares, 0))
    return distances
