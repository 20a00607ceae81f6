"""What one pass over the records finds: enough for every rule, in a few bytes a record."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom_common.errors import BadSpec

MOST_VALUES = 1_000_000  # of one column; a column of texts by mistake would fill the memory
NOTHING = "(nothing)"
"""The value of records whose column is null."""


@dataclass(frozen=True, kw_only=True)
class Census:
    """All records, in order.

    Memory: 8 bytes a record, and 4 for each column.
    """

    names: tuple[str, ...]
    """The input files, as they are told."""
    files: NDArray[np.int32]
    """Number of each record's file."""
    sizes: NDArray[np.uint32]
    """Bytes of each record, at most 4 GiB."""
    columns: Mapping[str, "Coded"]

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A column as numbers of its values."""

    codes: NDArray[np.int32]
    values: tuple[str, ...]
    """In the order in which they came first."""


@dataclass
class Counting:
    """A census as it is taken."""

    names: Sequence[str]
    wanted: Sequence[str]
    """Columns to read."""
    _files: "array[int]" = field(default_factory=lambda: array("i"))
    _sizes: "array[int]" = field(default_factory=lambda: array("I"))

    def __post_init__(self) -> None:
        self._codes = {name: array("i") for name in self.wanted}
        self._numbers: dict[str, dict[str, int]] = {name: {} for name in self.wanted}

    def add(self, file: int, size_bytes: int, values: Iterable[object] = ()) -> None:
        """The next record, with its values of the wanted columns.

        Raises:
            BadSpec: a value is no label, or there are too many different ones.
        """
        self._files.append(file)
        self._sizes.append(min(size_bytes, 0xFFFFFFFF))
        for name, value in zip(self.wanted, values, strict=True):
            numbers = self._numbers[name]
            number = numbers.setdefault(self._text(name, value), len(numbers))
            if number == MOST_VALUES:
                raise BadSpec(
                    f"column {name} has more than {MOST_VALUES} different values: choose one of groups"
                )
            self._codes[name].append(number)

    def census(self) -> Census:
        """What was found.

        Raises:
            BadSpec: there were no records.
        """
        if not self._files:
            raise BadSpec(f"there are no records in {', '.join(self.names)}")
        return Census(
            names=tuple(self.names),
            files=np.frombuffer(self._files, np.int32),
            sizes=np.frombuffer(self._sizes, np.uint32),
            columns={
                name: Coded(codes=np.frombuffer(codes, np.int32), values=tuple(self._numbers[name]))
                for name, codes in self._codes.items()
            },
        )

    def _text(self, column: str, value: object) -> str:
        if value is None:
            return NOTHING
        if isinstance(value, bool | int | float | str):
            return str(value).encode(errors="backslashreplace").decode()  # JSON may hold half a character
        raise BadSpec(
            f"record {len(self._files)} holds {type(value).__name__} in column {column}, "
            "wanted text or a number"
        )


class Records(Protocol):
    """The records of some files of one format."""

    def count(self, columns: Sequence[str]) -> Census:
        """Read all records once.

        Raises:
            BadSpec: a file is not of the format, or lacks a column.
        """
        ...

    def copy(self, sites: NDArray[np.int32], folders: Sequence[Path]) -> str:
        """Copy each record to the folder of its site, in order; the glob by which a site finds its own."""
        ...
