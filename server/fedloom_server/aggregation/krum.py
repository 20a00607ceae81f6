"""Krum and multi-Krum: the updates that lie closest to their neighbours."""

from collections.abc import Sequence

import numpy as np

from fedloom_common.runspec import KrumRule, MultiKrumRule
from fedloom_server.aggregation.gram import squared_distances
from fedloom_server.aggregation.output import Values


def krum_scores(gram: Values, byzantine: int) -> Values:
    """s(i) = Σ ‖θᵢ − θⱼ‖²  over the n − f − 2 updates j that lie closest to update i.

    Source: Blanchard et al. 2017, arXiv:1703.02757, section 4.
    """
    distances = squared_distances(gram)
    neighbours = len(gram) - byzantine - 2
    assert neighbours >= 1, f"{len(gram)} updates, of which {byzantine} may be bad, have no neighbours"
    nobody_is_its_own = np.diag(np.full(len(gram), np.inf))
    others = np.sort(distances + nobody_is_its_own, axis=1)
    scores: Values = others[:, :neighbours].sum(axis=1)
    return scores


def krum_shares(gram: Values, examples: Sequence[int], rule: KrumRule | MultiKrumRule) -> Values:
    """1, or nₖ if weighted, for the updates with the least scores, 0 for the others; of equals the first.

    Krum takes one. Multi-Krum takes m; with m ≤ n − f − 2 the bad ones among them lie so near to good
    ones that the mean is one of good updates but for a bounded part.

    Source: Blanchard et al. 2017, arXiv:1703.02757; El Mhamdi et al. 2018, arXiv:1802.07927, for m.
    """
    selected = 1
    if isinstance(rule, MultiKrumRule):
        selected = rule.selected or len(gram) - rule.byzantine - 2
    best = np.argsort(krum_scores(gram, rule.byzantine), kind="stable")[:selected]
    shares = np.zeros(len(gram))
    is_weighted = isinstance(rule, MultiKrumRule) and rule.weighted
    shares[best] = np.asarray(examples)[best] if is_weighted else 1
    return shares
