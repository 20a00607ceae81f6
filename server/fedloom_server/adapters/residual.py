"""FedEx: averages of A and B, and the residual that makes their product the average of products.

Source: Singhal et al. 2024, arXiv:2410.09432, section 4: W₀ takes up  Σ pₖBₖAₖ − B̄·Ā.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom_common.adapters.folds import fold_shapes, write_arrays
from fedloom_common.adapters.layout import Layout, Target
from fedloom_server.adapters.updates import Given, WholeUpdate, shares


def write_residual(given: Given, layout: Layout, out: Path) -> bool:
    """Write the residual of every weight as factors; says whether there is one: of one update there is not.

    Because  Σ pₖ(Bₖ − B̄) = 0,  the residual is  Σ pₖ(Bₖ − B̄)(Aₖ − C)  for any C. With the last
    update's A for C its rank is at most (K − 1)·r instead of (K + 1)·r, and nothing large cancels out.

    Memory: the factors of one weight, of all updates, in float64.

    Raises:
        BadTensor: an update cannot be merged; the message names its site.
    """
    if len(given.updates) < 2:
        return False
    with given.open() as updates:
        shapes = [
            shape for target in layout.targets for shape in _shapes(target, updates[0], len(updates) - 1)
        ]
        write_arrays(out, shapes, _arrays(layout, updates))
    return True


def _shapes(target: Target, update: WholeUpdate, times: int) -> list[tuple[str, tuple[int, ...]]]:
    (rank, inputs), outputs = update.shape(target.a), update.shape(target.b)[0]
    return fold_shapes(target, rank * times, inputs, outputs)


def _arrays(layout: Layout, updates: Sequence[WholeUpdate]) -> Iterator[NDArray[np.floating]]:
    for target in layout.targets:
        a, b = residual_factors(
            [update.read(target.a) for update in updates],
            [update.read(target.b) for update in updates],
            shares(updates),
        )
        rank = updates[0].shape(target.a)[0]
        yield from target.factors(a, b, layout.scale(rank))


def residual_factors(
    a: Sequence[NDArray[np.float64]], b: Sequence[NDArray[np.float64]], share: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A and B of the residual, [(K−1)·r, inputs] and [outputs, (K−1)·r]."""
    mean = sum(part * matrix for part, matrix in zip(share, b, strict=True))
    rows = [matrix - a[-1] for matrix in a[:-1]]
    columns = [part * (matrix - mean) for part, matrix in zip(share[:-1], b[:-1], strict=True)]
    return np.concatenate(rows), np.concatenate(columns, axis=1)
