"""Parquet files and directories that the datasets library saved: records in batches of Arrow's."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedloom_client.saveddatasets import open_saved
from fedloom_client.splitting.census import Census, Counting
from fedloom_common.errors import BadSpec

BATCH_ROWS = 8192
PARQUET_FILE = "data.parquet"


class ParquetFiles:
    """Parquet files with the same columns."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files.

        Raises:
            BadSpec: one is no Parquet, or has other columns than the first.
        """
        self._paths = paths
        try:
            self._schemas = [pq.read_schema(path) for path in paths]
        except (pa.ArrowInvalid, OSError) as error:
            raise BadSpec(f"one of {', '.join(map(str, paths))} is not Parquet: {error}") from error
        for path, schema in zip(paths, self._schemas, strict=True):
            if not schema.equals(self._schemas[0]):
                raise BadSpec(
                    f"{path} has other columns than {paths[0]}: {_told(schema)}, "
                    f"and {_told(self._schemas[0])}"
                )

    def count(self, columns: Sequence[str]) -> Census:
        """Read every record once.

        Raises:
            BadSpec: there is no such column.
        """
        for column in columns:
            _require(column, self._schemas[0].names, self._paths[0])
        return _count([str(path) for path in self._paths], self._batches(), columns)

    def copy(self, sites: NDArray[np.int32], folders: Sequence[Path]) -> str:
        """Copy the records, of each batch those of a site together."""
        begin = 0
        with ExitStack() as stack:
            writers = [
                stack.enter_context(pq.ParquetWriter(folder / PARQUET_FILE, self._schemas[0]))
                for folder in folders
            ]
            for _, batch in self._batches():
                batch_sites = sites[begin : begin + batch.num_rows]
                begin += batch.num_rows
                for site in np.unique(batch_sites):
                    writers[site].write_batch(batch.take(pa.array(np.flatnonzero(batch_sites == site))))
        return f"data/{PARQUET_FILE}"

    def _batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        for number, path in enumerate(self._paths):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH_ROWS):
                    yield number, batch


class SavedDataset:
    """A directory that ``save_to_disk`` wrote; of one with splits, its ``train``."""

    def __init__(self, path: Path) -> None:
        """Map the directory's files into memory.

        Raises:
            BadSpec: it is no such directory, or has splits and no ``train``.
        """
        try:
            self._path, self._data = path, open_saved(path)
        except ValueError as error:
            raise BadSpec(str(error)) from error

    def count(self, columns: Sequence[str]) -> Census:
        """Read every record once; of class labels the names.

        Raises:
            BadSpec: there is no such column.
        """
        from datasets import ClassLabel

        features = self._data.features
        for column in columns:
            _require(column, list(features), self._path)
        names = {name: features[name].names for name in columns if isinstance(features[name], ClassLabel)}
        batches = ((0, table) for table in self._data.with_format("arrow").iter(BATCH_ROWS))
        return _count([str(self._path)], batches, columns, names)

    def copy(self, sites: NDArray[np.int32], folders: Sequence[Path]) -> str:
        """Copy the records, with the features as they are."""
        from datasets import disable_progress_bars

        disable_progress_bars()  # there would be one for each site
        for number, folder in enumerate(folders):
            self._data.select(np.flatnonzero(sites == number)).save_to_disk(str(folder / "saved"))
        return "data/saved"


def _count(
    names: Sequence[str],
    batches: Iterator[tuple[int, Any]],
    columns: Sequence[str],
    classes: dict[str, list[str]] | None = None,
) -> Census:
    counting = Counting(names, columns)
    for number, batch in batches:
        size_bytes = batch.nbytes // max(1, batch.num_rows)
        values = [batch.column(name).to_pylist() for name in columns]
        for place, name in enumerate(columns):
            if classes and (known := classes.get(name)):
                values[place] = [None if v is None or v < 0 else known[v] for v in values[place]]
        for row in zip(*values, strict=True) if columns else [()] * batch.num_rows:
            counting.add(number, size_bytes, row)
    return counting.census()


def _require(column: str, known: Sequence[str], path: Path) -> None:
    if column not in known:
        raise BadSpec(f"{path} has no column {column}: it has {', '.join(sorted(known))}")


def _told(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
