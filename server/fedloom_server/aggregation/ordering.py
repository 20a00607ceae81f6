"""Sorting each column of a matrix: of few rows by a network of whole rows, which costs no copy."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

MOST_ROWS_OF_A_NETWORK = 16  # with more, sorting a transposed copy takes less time than its comparisons


def sort_columns(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix with every column in rising order; the argument is used up.

    Of numbers that are not NaN the result depends on the numbers alone, not on the order of the rows.
    """
    rows = len(matrix)
    if rows > MOST_ROWS_OF_A_NETWORK:
        columns = np.ascontiguousarray(matrix.T)
        columns.sort(axis=1)
        return columns.T
    smaller = np.empty(matrix.shape[1:])
    for one, other in comparisons(rows):
        np.minimum(matrix[one], matrix[other], out=smaller)
        np.maximum(matrix[one], matrix[other], out=matrix[other])
        matrix[one] = smaller
    return matrix


@cache
def comparisons(rows: int) -> tuple[tuple[int, int], ...]:
    """Pairs of places to be put in order, one after the other, that sort so many values.

    Source: Batcher's merge exchange, Knuth, The Art of Computer Programming 3, algorithm 5.2.2M.
    """
    pairs: list[tuple[int, int]] = []
    top = 1 << max(0, (rows - 1).bit_length() - 1)
    p = top if rows > 1 else 0
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(place, place + d) for place in range(rows - d) if place & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return tuple(pairs)
