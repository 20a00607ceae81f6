"""Which format files have, and what reads it."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from fedloom_client.splitting.census import Records
from fedloom_common.errors import BadSpec

Format = Literal["text", "jsonl", "parquet", "dataset"]
"""As a data set's ``format`` in site.yaml names them."""

_BY_SUFFIX: dict[str, Format] = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files and directories of some paths or globs, each once.

    Raises:
        BadSpec: nothing matches one of them.
    """
    found: list[Path] = []
    for pattern in patterns:
        names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if not names:
            raise BadSpec(f"no file matches {pattern}")
        found += map(Path, names)
    return list(dict.fromkeys(found))


def format_of(paths: Sequence[Path], given: str | None) -> Format:
    """The format that was given, or that the names tell.

    Raises:
        BadSpec: there is no such format, or the names do not tell one.
    """
    if given is not None:
        if given not in get_args(Format):
            raise BadSpec(f"--format is {given}, wanted one of {', '.join(get_args(Format))}")
        return cast("Format", given)
    told = {"dataset" if path.is_dir() else _BY_SUFFIX.get(path.suffix.lower()) for path in paths}
    if len(told) != 1 or (only := told.pop()) is None:
        names = ", ".join(sorted({path.name for path in paths})[:5])
        raise BadSpec(
            f"the names ({names}) do not tell one format: give --format, one of {', '.join(get_args(Format))}"
        )
    return only


def open_records(paths: Sequence[Path], kind: Format) -> Records:
    """The records of some files.

    Raises:
        BadSpec: a path is a directory where a file is wanted, or the other way round, or of another format.
    """
    for path in paths:
        if path.is_dir() != (kind == "dataset"):
            wanted = "a directory that the datasets library saved" if kind == "dataset" else "a file"
            raise BadSpec(f"{path} is {'a directory' if path.is_dir() else 'a file'}, wanted {wanted}")
    if kind == "text":
        from fedloom_client.splitting.textfiles import TextFiles

        return TextFiles(paths)
    if kind == "jsonl":
        from fedloom_client.splitting.jsonlines import JsonLines

        return JsonLines(paths)
    from fedloom_client.splitting.arrowrows import ParquetFiles, SavedDataset  # 2 s, for these alone

    if kind == "parquet":
        return ParquetFiles(paths)
    if len(paths) > 1:
        raise BadSpec(f"{len(paths)} directories of datasets are given, wanted one: join them first")
    return SavedDataset(paths[0])
