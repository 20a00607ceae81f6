"""New adapters: A drawn from the run's seed, B zero, so that they change nothing yet."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom_common.adapters.folds import write_arrays
from fedloom_common.adapters.layout import Layout, read_values
from fedloom_common.tensorfiles import TensorFile

Means = Mapping[str, NDArray[np.float64]]


def draw_a(rank: int, inputs: int, *, seed: int, draw: int, number: int) -> NDArray[np.float32]:
    """A of the target of that number, uniform in ±1/√inputs; another one for every ``draw``.

    Source: ``reset_lora_parameters`` of peft's LoraLayer: kaiming_uniform_ with a = √5, bounded by 1/√inputs.
    """
    generator = np.random.default_rng([seed, draw, number])
    bound = 1 / np.sqrt(inputs)
    drawn: NDArray[np.float64] = (2 * generator.random((rank, inputs)) - 1) * bound
    return drawn.astype(np.float32)


def write_fresh(model: Path, layout: Layout, means: Means, out: Path, *, seed: int, draw: int) -> None:
    """Write an adapter like ``model`` with new A and B; other tensors are those of ``means``.

    Memory: one tensor.
    """
    with TensorFile(model) as file:
        shapes = [(info.name, info.shape) for info in file.manifest.tensors]
    numbers = {target.a: number for number, target in enumerate(layout.targets)}
    zeros = {target.b for target in layout.targets}

    def arrays() -> Iterator[NDArray[np.floating]]:
        for name, shape in shapes:
            if name in numbers:
                rank, inputs = shape
                yield draw_a(rank, inputs, seed=seed, draw=draw, number=numbers[name])
            else:
                yield np.zeros(shape, np.float32) if name in zeros else means[name].astype(np.float32)

    write_arrays(out, shapes, arrays(), durable=True)


def write_ranked(model: Path, layout: Layout, rank: int, out: Path) -> None:
    """Write the adapter for sites of a lower rank: the first rows of A and columns of B.

    Memory: one tensor.
    """
    a, b = {target.a for target in layout.targets}, {target.b for target in layout.targets}

    def shape_of(name: str, whole: tuple[int, ...]) -> tuple[int, ...]:
        if name in a:
            return rank, whole[1]
        return (whole[0], rank) if name in b else whole

    with TensorFile(model) as file:
        shapes = [(info.name, shape_of(info.name, info.shape)) for info in file.manifest.tensors]
        arrays = (read_values(file, name)[tuple(slice(0, size) for size in shape)] for name, shape in shapes)
        write_arrays(out, shapes, arrays, durable=True)
