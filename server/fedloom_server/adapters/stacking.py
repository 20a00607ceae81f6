"""FLoRA: the adapters of all sites, of whatever ranks, stacked into one whose product is their average.

Source: Wang et al. 2024, arXiv:2409.05976, section 3.2: B = [p₁B₁ … p_KB_K], A = [A₁; …; A_K].
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom_common.adapters.folds import fold_shapes, write_arrays
from fedloom_common.adapters.layout import Layout, Target
from fedloom_server.adapters.fresh import Means
from fedloom_server.adapters.updates import Given, WholeUpdate, shares


def write_stack(given: Given, layout: Layout, out: Path) -> Means:
    """Write  Σ pₖ·(α/rₖ)·BₖAₖ  of every weight as factors; the averages of whatever else sites train.

    Memory: the factors of one weight, of all updates, in float64, and what is averaged.

    Raises:
        BadTensor: an update cannot be merged; the message names its site.
    """
    with given.open() as updates:
        shapes = [shape for target in layout.targets for shape in _shapes(target, updates)]
        write_arrays(out, shapes, _arrays(layout, updates))
        paired = {name for target in layout.targets for name in (target.a, target.b)}
        return {name: _mean(name, updates) for name in updates[0].names if name not in paired}


def _shapes(target: Target, updates: Sequence[WholeUpdate]) -> list[tuple[str, tuple[int, ...]]]:
    rank = sum(update.shape(target.a)[0] for update in updates)
    return fold_shapes(target, rank, updates[0].shape(target.a)[1], updates[0].shape(target.b)[0])


def _arrays(layout: Layout, updates: Sequence[WholeUpdate]) -> Iterator[NDArray[np.floating]]:
    for target in layout.targets:
        parts = [
            share * layout.scale(update.shape(target.a)[0]) * update.read(target.b)
            for share, update in zip(shares(updates), updates, strict=True)
        ]
        rows = [update.read(target.a) for update in updates]
        yield from target.factors(np.concatenate(rows), np.concatenate(parts, axis=1), 1.0)


def _mean(name: str, updates: Sequence[WholeUpdate]) -> NDArray[np.float64]:
    return sum(
        (share * update.read(name) for share, update in zip(shares(updates), updates, strict=True)),
        start=np.zeros(updates[0].shape(name)),
    )
