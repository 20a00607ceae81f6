"""Examples on disk as arrays by field, mapped into memory.

A field's values lie one after the other in a file of its own. Where every example has as many of them, that
is all; else a second file tells where each example's values end.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
"""A batch by field: [examples, values]."""

_ENDS = np.dtype(np.int64)


@dataclass(frozen=True)
class Field:
    """How a field's values lie on disk."""

    name: str
    dtype: str
    width: int | None
    """Values of every example; None if each has a number of its own."""

    def path(self, folder: Path) -> Path:
        """The values."""
        return folder / f"{self.name}.bin"

    def ends_path(self, folder: Path) -> Path:
        """Where each example's values end, if they are of several lengths."""
        return folder / f"{self.name}.ends"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What there is to know of packed data, besides the examples."""

    fields: Sequence[Field]
    largest: Mapping[str, int]
    """Largest value of each field."""
    records: int = 0
    """Records that examples were made of, one for one; 0 for texts, of which all is taken."""
    shortened: int = 0
    """Of those, how many were too long and lost something, or all."""

    def to_json(self) -> str:
        """What ``from_json`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Packed":
        """What ``to_json`` wrote."""
        facts = json.loads(text)
        return cls(**facts | {"fields": [Field(**field) for field in facts["fields"]]})


class Examples:
    """Examples that can be taken by number.

    Memory: pages that are being read; all ranks of a host share them.
    """

    def __init__(self, folder: Path, fields: Sequence[Field]) -> None:
        """Map what lies in a folder."""
        self._even: dict[str, NDArray[Any]] = {}
        self._ragged: dict[str, tuple[NDArray[Any], NDArray[np.int64]]] = {}
        for field in fields:
            values = _map(field.path(folder), np.dtype(field.dtype))
            if field.width is None:
                self._ragged[field.name] = values, _map(field.ends_path(folder), _ENDS)
            else:
                number = len(values) // field.width
                self._even[field.name] = values[: number * field.width].reshape(number, field.width)
        counts = {len(values) for values in self._even.values()}
        counts |= {len(ends) for _, ends in self._ragged.values()}
        assert len(counts) == 1, f"fields of {folder} have {counts} examples"
        self._number = counts.pop()

    def __len__(self) -> int:
        return self._number

    def take(self, numbers: NDArray[np.int64], padding: Mapping[str, int]) -> Arrays:
        """Some examples, by field: [examples, values]. Shorter ones are filled up with the field's padding.

        Where ``input_ids`` were of several lengths, ``attention_mask`` says which are not padding.
        """
        arrays: Arrays = {name: values[numbers] for name, values in self._even.items()}
        for name, (values, ends) in self._ragged.items():
            parts = [values[(ends[n - 1] if n else 0) : ends[n]] for n in numbers.tolist()]
            longest = max(map(len, parts))
            arrays[name] = np.full((len(parts), longest), padding[name], np.int64)
            for row, part in zip(arrays[name], parts, strict=True):
                row[: len(part)] = part
            if name == "input_ids":
                lengths = np.array([len(part) for part in parts])
                arrays["attention_mask"] = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        return arrays


def spread(number: int, most: int | None) -> NDArray[np.int64]:
    """At most so many numbers of examples, evenly from all of them, so that every text has its part."""
    if most is None or number <= most:
        return np.arange(number)
    return np.arange(most) * number // most


class ExamplesWriter:
    """Examples of several lengths, on disk as they come."""

    def __init__(self, folder: Path, fields: Sequence[Field]) -> None:
        folder.mkdir()
        self._files = {field.name: field.path(folder).open("wb") for field in fields}
        self._ends = {field.name: field.ends_path(folder).open("wb") for field in fields}
        self._dtypes = {field.name: np.dtype(field.dtype) for field in fields}
        self.number = 0
        self.largest = dict.fromkeys(self._files, 0)

    def add(self, example: Mapping[str, Sequence[int]]) -> None:
        """Add an example, with every field."""
        for name, file in self._files.items():
            values = example[name]
            file.write(np.array(values, self._dtypes[name]).tobytes())
            self._ends[name].write(_ENDS.type(file.tell() // self._dtypes[name].itemsize).tobytes())
            self.largest[name] = max(self.largest[name], max(values, default=0))
        self.number += 1

    def sync(self) -> None:
        """Wait until all is on disk."""
        for file in (*self._files.values(), *self._ends.values()):
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._files.values(), *self._ends.values()):
            file.close()


def _map(file: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if file.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(file, dtype, mode="r"))  # without what memmap adds to every slice
