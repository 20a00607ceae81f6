"""The site's files as a stream of records, read through the datasets library."""

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fedloom_client.training.orders import Source
from fedloom_client.training.readers import read
from fedloom_common.errors import TrainingFailed

MAIN_FIELDS = ("text", "source", "messages", "prompt")
"""Each of fedloom's own tasks reads one of them."""
RECORDS_LOOKED_AT = 1000  # for a field that a record lacks


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record."""

    values: Mapping[str, Any]
    """By the names that tasks use, and by the record's own."""
    held_out: bool
    number: int
    """From 1."""


class Records:
    """The records of a data set, in an order that depends on the files alone.

    Memory: one record, whatever the number of files.
    """

    def __init__(self, source: Source) -> None:
        """Find the files.

        Raises:
            TrainingFailed: nothing matches one of the globs.
        """
        self.source = source
        self._paths = _matching(source)
        self._in_some: set[str] = set()
        self.total = sum(path.stat().st_size for path in self._paths) if source.format == "text" else 0
        """Bytes of text files; 0 (unknown) for records."""

    def fingerprint(self) -> str:
        """Changes whenever a file or the way it is read does."""
        facts = [
            (str(path), stat.st_size, stat.st_mtime_ns)
            for top in self._paths
            for path in ([top] if top.is_file() else sorted(top.rglob("*")))
            if (stat := path.stat())
        ]
        text = json.dumps([asdict(self.source), facts])
        return hashlib.sha256(text.encode()).hexdigest()

    def texts(self) -> Iterator[str]:
        """The whole content of each text file.

        Raises:
            TrainingFailed: a file is no text.
        """
        return (record["text"] for record in self._records())

    def rows(self, fields: Sequence[str]) -> Iterator[Row]:
        """Every record that has the fields.

        Raises:
            TrainingFailed: a file cannot be read as its format, or a record lacks a field.
        """
        own = self.source.fields
        for number, (record, held_out) in enumerate(
            zip(self._records(), held_out_records(self.source.held_out), strict=False), start=1
        ):
            for name in {*fields, *own}:
                there = own.get(name, name)
                if there not in record and (name in fields or not self._is_in_some(there)):
                    raise TrainingFailed(self._lacks(name, number, record))
            # what a record has under a task's own name is not what the config means by it
            values = {name: value for name, value in record.items() if name not in own}
            values |= {name: record[there] for name, there in own.items() if there in record}
            yield Row(values=values, held_out=held_out, number=number)

    def describe(self) -> str:
        """The files, for people."""
        return ", ".join(self.source.files)

    def _is_in_some(self, there: str) -> bool:
        """Whether the first records have a field: lines of JSON may leave out what a task does without."""
        if there not in self._in_some:
            if not any(there in record for record in islice(self._records(), RECORDS_LOOKED_AT)):
                return False
            self._in_some.add(there)
        return True

    def _lacks(self, name: str, number: int, record: Mapping[str, Any]) -> str:
        there, other = ", ".join(sorted(record)) or "none", min(record, default="body")
        wanted = self.source.fields.get(name, name)
        return (
            f"records of {self.describe()}, such as number {number}, have no field {wanted}: they have "
            f"{there}; name the one that holds the {name} in the data set's fields, such as fields: "
            f"{{{name}: {other}}}"
        )

    def _records(self) -> Iterator[dict[str, Any]]:
        return read(self.source.format, self._paths)


def held_out_records(share: float) -> Iterator[bool]:
    """For each record in turn, whether it is held out: one at random of every 1/share, the same each time."""
    generator = np.random.default_rng(0)
    number, stratum = 0, 0
    chosen = int(generator.random() / share)
    while True:
        held = number == chosen
        yield held
        number += 1
        while chosen < number:
            stratum += 1
            chosen = int((stratum + generator.random()) / share)


def _matching(source: Source) -> list[Path]:
    wanted: Callable[[Path], bool] = Path.is_dir if source.format == "dataset" else Path.is_file
    paths: list[Path] = []
    for pattern in source.files:
        names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [Path(name) for name in names if wanted(Path(name))]
        if not found:
            raise TrainingFailed(_nothing_in(pattern, names, source))
        paths += found
    return list(dict.fromkeys(paths))


def _nothing_in(pattern: str, names: Sequence[str], source: Source) -> str:
    if source.format == "dataset" and names:
        return f"{names[0]} is no folder: give the one that the datasets library saved, or another format"
    is_named = not glob.has_magic(Path(pattern).name)
    if is_named and (folder := next((Path(name) for name in names if Path(name).is_dir()), None)):
        return f"{folder} is a folder: give {folder}/*.{source.format.replace('text', 'txt')}"
    kind = "folder" if source.format == "dataset" else "file"
    return f"no {kind} matches {pattern}: correct the data set's files in the site's config"
