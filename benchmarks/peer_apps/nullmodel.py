"""The model of null training inside a peer's processes: made, followed and checked. Needs NumPy alone.

The benchmark passes a case by a JSON file, whose path is in the environment: no peer has to carry it.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CASE = "FEDLOOM_BENCHMARK_CASE"
CONSTANT = np.float32(0.001)
SCALE = np.float32(0.02)  # of a language model's initial weights

Tensor = NDArray[np.float32]


class NullCase:
    """What is to be done, for the program at the peer's server."""

    def __init__(self) -> None:
        facts: dict[str, Any] = json.loads(Path(os.environ[CASE]).read_text())
        self.sites: int = facts["sites"]
        self.rounds: int = facts["rounds"]
        self._shapes: dict[str, list[int]] = facts["shapes"]
        self._marks = Path(facts["marks"])

    def initial(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor's name and first values, the same each time."""
        for seed, (name, shape) in enumerate(self._shapes.items()):
            values = np.random.default_rng(seed).standard_normal(shape, np.float32)
            values *= SCALE
            yield name, values

    def mark(self, round_number: int) -> None:
        """Tell the benchmark that a round has ended now; 0: that the first one begins."""
        self._tell({"round": round_number, "at_s": time.time()})

    def check(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Tell the benchmark how far the last model is off the first plus a constant a round."""
        found = dict(tensors)
        off_by, wrong = [0.0], sorted(found.keys() - self._shapes.keys())
        for name, values in self.initial():
            values += self.rounds * CONSTANT
            last = found.get(name)
            if last is None or last.dtype != values.dtype or last.shape != values.shape:
                wrong.append(name)
            else:
                off_by.append(float(np.abs(last - values).max()))
        self._tell({"off_by": float(np.max(off_by)), "wrong": wrong})

    def _tell(self, facts: dict[str, Any]) -> None:
        with self._marks.open("a") as file:
            file.write(json.dumps(facts) + "\n")
