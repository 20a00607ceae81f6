"""Metrics that are no means, of counts that add up over batches, ranks and sites."""

from collections.abc import Sequence


def macro_f1(hits: Sequence[float], predicted: Sequence[float], actual: Sequence[float]) -> float:
    """Mean over labels of F1 = 2·hits / (predicted + actual), from counts by label.

    A label that nobody predicted and no example has is left out, as in scikit-learn's f1_score.
    """
    scores = [
        2 * hit / (said + there)
        for hit, said, there in zip(hits, predicted, actual, strict=True)
        if said + there
    ]
    return sum(scores) / len(scores) if scores else 0.0
