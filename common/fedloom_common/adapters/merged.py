"""Whole models of base, folds and adapter, and adapters that hold all that was folded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom_common.adapters.folds import Folds, add_product, write_arrays
from fedloom_common.adapters.layout import Layout, Target, Values, head_name, read_values
from fedloom_common.files import atomic_file
from fedloom_common.floats import encode
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import ITEM_BYTES, TensorInfo, encode_header

KEPT_SHARE = 1e-6  # of the largest singular value: what is below is fp32's rounding


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """The files that make one model."""

    base: Path
    folds: Sequence[Path]
    adapter: Path
    layout: Layout
    frozen_a: Path | None = None
    """A, where only B is trained."""

    def halves(self, target: Target, adapter: TensorFile) -> tuple[Values, Values]:
        """A and B of a weight."""
        if self.frozen_a is None:
            return read_values(adapter, target.a), read_values(adapter, target.b)
        with TensorFile(self.frozen_a) as frozen:
            return read_values(frozen, target.a), read_values(adapter, target.b)

    def factors(self, target: Target, adapter: TensorFile) -> tuple[Values, Values]:
        """The adapter's change of a weight, α/r counted in."""
        a, b = self.halves(target, adapter)
        return target.factors(a, b, self.layout.scale(a.shape[0]))


def write_merged(files: AdapterFiles, out: Path, dtype: str) -> None:
    """Write a model in which the adapter and all folds are part of the weights; floats become ``dtype``.

    Memory: one weight in fp32.

    Raises:
        BadTensor: the files do not belong together.
    """
    targets = {target.weight: target for target in files.layout.targets}
    with TensorFile(files.base) as base, TensorFile(files.adapter) as adapter, Folds(files.folds) as folds:
        infos = base.manifest.tensors
        entries = [(info.name, dtype if info.is_float else info.dtype, info.shape) for info in infos]
        with atomic_file(out) as file:
            file.write(encode_header(entries))
            for info in infos:
                if not info.is_float:
                    file.write(_raw(base, info).data)
                    continue
                is_head = info.name in files.layout.heads
                weight = read_values(*((adapter, head_name(info.name)) if is_head else (base, info.name)))
                folds.apply(info.name, weight)
                if info.name in targets:
                    add_product(weight, *files.factors(targets[info.name], adapter), info.name)
                raw = np.empty(weight.size * ITEM_BYTES[dtype], np.uint8)
                encode(weight.reshape(-1), dtype, raw)
                file.write(raw.data)


def write_whole_adapter(files: AdapterFiles, out: Path) -> tuple[Layout, int]:
    """Write an adapter for the base as it was published: it holds what was folded into the base, too.

    Where nothing was, that is the adapter as it was trained. Else its rank is the smallest that tells all
    of it to fp32's rounding, the same for every weight, and its α is its rank. Tells layout and rank.

    Memory: the factors of all weights, in fp32.

    Raises:
        BadTensor: the files do not belong together.
    """
    layout = files.layout
    with TensorFile(files.adapter) as adapter:
        if files.folds:
            pairs = list(_pairs(files, adapter))
            rank = max(left.shape[1] for left, _ in pairs)
            layout = replace(layout, alpha=float(rank))
            matrices = [
                half
                for target, pair in zip(layout.targets, pairs, strict=True)
                for half in _as_halves(target, *pair, rank)
            ]
        else:
            matrices = [half for target in layout.targets for half in files.halves(target, adapter)]
        heads = [read_values(adapter, head_name(weight)) for weight in layout.heads]
    names = [name for target in layout.targets for name in (target.a, target.b)]
    names, matrices = names + [head_name(weight) for weight in layout.heads], matrices + heads
    shapes = [(name, matrix.shape) for name, matrix in zip(names, matrices, strict=True)]
    write_arrays(out, shapes, matrices, durable=True)
    return layout, matrices[0].shape[0]


def _pairs(files: AdapterFiles, adapter: TensorFile) -> Iterator[tuple[Values, Values]]:
    """Each weight's whole change as two factors of the smallest rank."""
    with TensorFile(files.base) as base, Folds(files.folds) as folds:
        for target in files.layout.targets:
            change, noise = folds.change(target.weight, read_values(base, target.weight))
            left, right = files.factors(target, adapter)
            yield shortened(change + left.astype(np.float64) @ right, noise)


def shortened(change: NDArray[np.float64], noise: float = 0.0) -> tuple[Values, Values]:
    """A matrix as the product of two, of the smallest rank that tells it to fp32's rounding and ``noise``.

    Source: Eckart and Young 1936: the singular values beyond a rank are what it leaves out at least.
    """
    left, values, right = np.linalg.svd(change, full_matrices=False)
    rank = max(1, int(np.count_nonzero(values > max(noise, KEPT_SHARE * values[0]))))
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _as_halves(target: Target, left: Values, right: Values, rank: int) -> tuple[Values, Values]:
    """A and B of a rank, which a smaller one is filled up to with zeros."""
    a, b = (left.T, right.T) if target.is_transposed else (right, left)
    missing = rank - a.shape[0]
    return (
        np.pad(a, ((0, missing), (0, 0))).astype(np.float32),
        np.pad(b, ((0, 0), (0, missing))).astype(np.float32),
    )


def _raw(file: TensorFile, info: TensorInfo) -> NDArray[Any]:
    raw = np.empty(info.size_bytes, np.uint8)
    file.read(info.name, 0, raw.data)
    return raw
