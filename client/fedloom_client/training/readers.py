"""The formats of a site's files: what a record of each is, and what is wrong with a bad file."""

import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fedloom_client.jsonlines import (
    UNREADABLE,
    BadLine,
    numbered_lines,
    record_of,
    require_object,
    value_of,
)
from fedloom_client.saveddatasets import open_saved
from fedloom_client.zstdfiles import register_zstd
from fedloom_common.errors import TrainingFailed

WANTED = {"text": "UTF-8 text", "parquet": "Parquet"}


def read(kind: str, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The records of some files of a format, in order; class labels as their names.

    Memory: one record, or one batch of Arrow's; of a JSON array the whole file.

    Raises:
        TrainingFailed: a file cannot be read as its format.
    """
    if kind in ("dataset", "jsonl"):
        for path in paths:
            yield from _saved(path) if kind == "dataset" else _of_json(path)
        return
    # each Parquet file has class labels of its own; texts have none, and there may be a great many
    for some in [[path] for path in paths] if kind == "parquet" else [paths]:
        try:
            yield from _stream(kind, some)
        except (ValueError, *UNREADABLE) as error:  # pyarrow's and codec errors; they do not name the file
            path, reason = _culprit(kind, some) or (some[0], str(error))
            raise TrainingFailed(
                f"{path} is not {WANTED[kind]}: mend it, or leave it out of the data set's files\n{reason}"
            ) from error


def _saved(path: Path) -> Iterable[dict[str, Any]]:
    try:
        data = open_saved(path)
    except ValueError as error:
        raise TrainingFailed(str(error)) from error
    return _with_class_names(data, data.features)


def _of_json(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file's lines, or of an array that is the whole file.

    Not by the datasets library, which takes what looks like a date for one.
    """
    try:
        lines = numbered_lines(path)
        first = next(lines, None)
        if first is not None and first[1].lstrip().startswith(b"["):
            yield from _of_array(path, b"".join(line for _, line in chain([first], lines)))
            return
        for number, line in chain([first] if first else [], lines):
            place = f"line {number} of {path}"
            record = record_of(line, place)
            yield _of_characters(record, place) if _may_lack_halves(line) else record
    except BadLine as error:
        raise TrainingFailed(str(error)) from error
    except OSError as error:
        raise TrainingFailed(
            f"{path} cannot be read: mend it, or leave it out of the data set's files\n{error}"
        ) from error


def _of_array(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    may_lack_halves = _may_lack_halves(content)
    for number, value in enumerate(value_of(content, f"the array in {path}"), start=1):
        place = f"item {number} of the array in {path}"
        record = require_object(value, place)
        yield _of_characters(record, place) if may_lack_halves else record


def _may_lack_halves(content: bytes) -> bool:
    return b"\\ud" in content or b"\\uD" in content


def _of_characters(record: dict[str, Any], place: str) -> dict[str, Any]:
    """The record, if no text of it has half of a surrogate pair, which no tokenizer takes."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"{place} has half of a surrogate pair: mend it, or leave it out\n{error}") from error
    return record


def _stream(kind: str, paths: Sequence[Path]) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    register_zstd()
    # streaming reads the files where they are; otherwise datasets copies them into its own cache first
    options = {"text": {"sample_by": "document"}}.get(kind, {})
    names = [glob.escape(str(path)) for path in paths if path.stat().st_size]
    if not names:  # datasets fails on a file without a record
        return []
    stream = load_dataset(kind, data_files={"train": names}, split="train", streaming=True, **options)
    return _with_class_names(stream, stream.features)


def _with_class_names(
    records: Iterable[dict[str, Any]], features: Mapping[str, Any] | None
) -> Iterable[dict[str, Any]]:
    """Class labels as names: a run numbers its labels in an order of its own."""
    from datasets import ClassLabel

    classes = {
        name: feature.names for name, feature in (features or {}).items() if isinstance(feature, ClassLabel)
    }
    # a ClassLabel that was given no names has its numbers for names, which say nothing
    classes = {name: known for name, known in classes.items() if known != [str(n) for n in range(len(known))]}
    if not classes:
        return records
    return (
        record | {name: _name(record.get(name), known) for name, known in classes.items()}
        for record in records
    )


def _name(number: int | None, known: Sequence[str]) -> str | None:
    return None if number is None or not 0 <= number < len(known) else known[number]  # -1 is no label


def _culprit(kind: str, paths: Sequence[Path]) -> tuple[Path, str] | None:
    for path in paths:
        try:
            for _ in _stream(kind, [path]):
                pass
        except (ValueError, *UNREADABLE) as error:
            return path, str(error)
    return None
