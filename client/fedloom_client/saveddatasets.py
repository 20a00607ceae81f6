"""Directories that the datasets library saved: what training and `fedloom data split` make of them."""

from pathlib import Path
from typing import Any


def open_saved(path: Path) -> Any:
    """The datasets library's own view of a directory, mapped into memory; of one with splits, its ``train``.

    Raises:
        ValueError: it is no such directory, or has splits and no ``train``.
    """
    from datasets import DatasetDict, load_from_disk  # seconds to import

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a directory that the datasets library saved: {error}") from error
    if not isinstance(data, DatasetDict):
        return data
    if "train" not in data:
        raise ValueError(
            f"{path} holds the splits {', '.join(sorted(data))} and no train: name one of their folders"
        )
    return data["train"]
