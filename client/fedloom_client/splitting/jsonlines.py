"""JSON lines: one object a line, copied byte by byte."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom_client.jsonlines import BadLine, numbered_lines, record_of
from fedloom_client.splitting.census import Census, Counting
from fedloom_common.errors import BadSpec

FILE = "data.jsonl"


class JsonLines:
    """Files with one JSON object a line; empty lines are no records."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def count(self, columns: Sequence[str]) -> Census:
        """Read every line once.

        Raises:
            BadSpec: a line is no object, or lacks a column; names file and line.
        """
        counting = Counting([str(path) for path in self._paths], columns)
        for number, line_number, line in self._lines():
            place = f"line {line_number} of {self._paths[number]}"
            counting.add(number, len(line), _values(line, columns, place))
        return counting.census()

    def copy(self, sites: NDArray[np.int32], folders: Sequence[Path]) -> str:
        """Copy the lines as they are."""
        with ExitStack() as stack:
            files = [stack.enter_context((folder / FILE).open("wb")) for folder in folders]
            for (_, _, line), site in zip(self._lines(), sites.tolist(), strict=True):
                files[site].write(line if line.endswith(b"\n") else line + b"\n")
        return f"data/{FILE}"

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        for number, path in enumerate(self._paths):
            for line_number, line in numbered_lines(path):
                yield number, line_number, line


def _values(line: bytes, columns: Sequence[str], place: str) -> list[object]:
    try:
        record = record_of(line, place)
    except BadLine as error:
        raise BadSpec(str(error)) from error
    for column in columns:
        if column not in record:
            raise BadSpec(f"{place} has no column {column}: it has {', '.join(sorted(record)) or 'none'}")
    return [record[column] for column in columns]
