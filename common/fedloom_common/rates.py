"""The shape of a learning rate: a linear rise, then constant or a half wave of a cosine."""

import math
from typing import Literal


def rate_factor(
    kind: Literal["cosine", "constant"], warmup: int, final_ratio: float, step: int, total: int
) -> float:
    """Share of the peak at a step, counted from 0, of so many in ``total``.

    The rise reaches the peak at step ``warmup``; cosine is at ``final_ratio`` after the last step.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * min(1.0, done))) / 2
