"""Changes that were folded into the frozen weights, as files in a fixed order.

A fold holds, for each weight W of the base that it changes, two factors: ``W/left`` [rows, rank] and
``W/right`` [rank, columns]. It may instead hold W itself, which then takes the place of the base's and of
all folds before. Each product is taken in float64 and rounded once to fp32, block by block in a fixed
partition, so that whoever folds the same files into the same base comes to the same weights: sites that
fold each round as it comes, and those that come late and fold all of them at once.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedloom_common.adapters.layout import Target, Values, read_values
from fedloom_common.errors import BadTensor
from fedloom_common.files import atomic_file
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import encode_header

LEFT, RIGHT = "/left", "/right"
BLOCK_VALUES = 1 << 20  # of a weight at once: the float64 copies of larger ones would not fit a small host

Weight = NDArray[np.float32]
Shapes = Sequence[tuple[str, tuple[int, ...]]]


class Folds:
    """Fold files, open, first to last."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises BadTensor: a file is no safetensors file."""
        self._stack = ExitStack()
        try:
            self._files = [self._stack.enter_context(TensorFile(path)) for path in paths]
        except BaseException:
            self._stack.close()
            raise
        self._names = [{info.name for info in file.manifest.tensors} for file in self._files]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def weights(self) -> set[str]:
        """Names of the weights that are changed."""
        return {name.removesuffix(LEFT).removesuffix(RIGHT) for names in self._names for name in names}

    def apply(self, name: str, weight: Weight) -> None:
        """Change a weight in place.

        Memory: the factors of one fold, and a block.

        Raises:
            BadTensor: what a fold holds does not fit the weight.
        """
        first = self._last_whole(name)
        for file, names in zip(self._files[first:], self._names[first:], strict=True):
            if name in names:
                weight[...] = _fitting(read_values(file, name), weight.shape, name)
            elif name + LEFT in names:
                add_product(weight, read_values(file, name + LEFT), read_values(file, name + RIGHT), name)

    def change(self, name: str, pristine: Weight) -> tuple[NDArray[np.float64], float]:
        """What all folds change in a weight of the base, and how much of it may be rounding.

        Where the weight itself was written, the change is a difference of rounded numbers: what rounding
        to fp32 puts into it is noise, whose largest singular value the second result bounds.

        Source: Davidson and Szarek 2001, theorem II.13: that of noise of deviation σ is about σ(√m + √n).
        """
        first, change, noise = self._last_whole(name), np.zeros(pristine.shape), 0.0
        for file, names in zip(self._files[first:], self._names[first:], strict=True):
            if name in names:
                whole = _fitting(read_values(file, name), pristine.shape, name)
                change = whole.astype(np.float64) - pristine
                noise = float(abs(whole).max() * np.finfo(np.float32).eps * sum(map(math.sqrt, whole.shape)))
            elif name + LEFT in names:
                left, right = read_values(file, name + LEFT, np.float64), read_values(file, name + RIGHT)
                change += _fitting(left @ right, pristine.shape, name)
        return change, noise

    def _last_whole(self, name: str) -> int:
        """Index of the last fold that holds the weight itself, before which nothing matters; else 0."""
        return max((number for number, names in enumerate(self._names) if name in names), default=0)


def add_product(weight: Weight, left: Values, right: Values, name: str = "") -> None:
    """Add  left · right  to a weight in place, in float64 and rounded once.

    Raises:
        BadTensor: the factors are not of the weight's shape.
    """
    _fitting(weight, (left.shape[0], right.shape[1]), name)
    wide = right.astype(np.float64, copy=False)
    rows = max(1, BLOCK_VALUES // max(1, weight.shape[1]))
    for begin in range(0, weight.shape[0], rows):
        block = weight[begin : begin + rows]
        block[...] = block.astype(np.float64) + left[begin : begin + rows].astype(np.float64) @ wide


def write_arrays(
    path: Path, shapes: Shapes, arrays: Iterable[NDArray[Any]], *, durable: bool = False
) -> None:
    """Write fp32 tensors that are made one after the other; the file appears when it is whole.

    Memory: what making one array takes.
    """
    header = encode_header([(name, "F32", shape) for name, shape in shapes])
    with atomic_file(path, durable=durable) as file:
        file.write(header)
        for (name, shape), array in zip(shapes, arrays, strict=True):
            assert array.shape == shape, f"{name} is {array.shape}, announced as {shape}"
            file.write(np.ascontiguousarray(array, "<f4").data)


def folded_weights(base: TensorFile, folds: Folds, names: Iterable[str]) -> Iterator[Weight]:
    """Weights of the base with the folds in them.

    Memory: one weight in fp32, and what :meth:`Folds.apply` takes.
    """
    for name in names:
        weight = read_values(base, name)
        folds.apply(name, weight)
        yield weight


def _fitting(array: Values, shape: tuple[int, ...], name: str) -> Values:
    if array.shape != shape:
        raise BadTensor(f"a fold of {name} has shape {list(array.shape)}, wanted {list(shape)}")
    return array


def fold_shapes(target: Target, rank: int, inputs: int, outputs: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the two factors of a weight's fold of some rank."""
    rows, columns = (inputs, outputs) if target.is_transposed else (outputs, inputs)
    return [(target.weight + LEFT, (rows, rank)), (target.weight + RIGHT, (rank, columns))]
