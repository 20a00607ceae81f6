"""Text files: one record a file."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom_client.splitting.census import Census, Counting
from fedloom_common.errors import BadSpec


class TextFiles:
    """Files that are one document each."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def count(self, columns: Sequence[str]) -> Census:
        """Their sizes; text has no columns.

        Raises:
            BadSpec: a column is wanted.
        """
        if columns:
            raise BadSpec(
                f"text files have no column {columns[0]}: split them --by-file or --iid, or make JSON lines "
                "of them"
            )
        counting = Counting([str(path) for path in self._paths], ())
        for number, path in enumerate(self._paths):
            counting.add(number, path.stat().st_size)
        return counting.census()

    def copy(self, sites: NDArray[np.int32], folders: Sequence[Path]) -> str:
        """Copy the files under their names; of those with the same name, later ones get a number."""
        for path, site in zip(self._paths, sites.tolist(), strict=True):
            target, number = folders[site] / path.name, 1
            while target.exists():
                number += 1
                target = folders[site] / f"{path.stem}-{number}{path.suffix}"
            shutil.copyfile(path, target)
        return "data/*"
