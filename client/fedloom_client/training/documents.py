"""The site's files as a stream of texts, read through the datasets library."""

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedloom_client.training.orders import Source
from fedloom_common.errors import TrainingFailed

PIECE_CHARACTERS = 1 << 18  # a tokenizer keeps about 100 bytes a token while it works on one string


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a document; most documents are one piece."""

    text: str
    ends_document: bool
    held_out: bool | None
    """Where the document goes whole; None if its tail is held out."""
    done: int
    """Progress through the source at the piece's end, in the units of ``Documents.total``."""


class Documents:
    """The documents of a data set, in an order that depends on the files alone.

    Memory: one document, whatever the number of files.
    """

    def __init__(self, source: Source) -> None:
        """Find the files.

        Raises:
            TrainingFailed: nothing matches one of the globs.
        """
        self._source = source
        self._paths = _matching(source)
        self.total = sum(path.stat().st_size for path in self._paths) if source.format == "text" else 0
        """Bytes of text files; 0 (unknown) for records."""
        self.held_out_share = source.held_out

    def fingerprint(self) -> str:
        """Changes whenever a file or the way it is read does."""
        facts = [
            (str(path), stat.st_size, stat.st_mtime_ns)
            for top in self._paths
            for path in ([top] if top.is_file() else sorted(top.rglob("*")))
            if (stat := path.stat())
        ]
        text = json.dumps([asdict(self._source), facts])
        return hashlib.sha256(text.encode()).hexdigest()

    def __iter__(self) -> Iterator[Piece]:
        """Every document in pieces.

        Raises:
            TrainingFailed: a file cannot be read as its format, or records lack the text field.
        """
        if self._source.format == "text":
            return self._text_pieces()
        return self._record_pieces()

    def _text_pieces(self) -> Iterator[Piece]:
        done = 0
        for record in self._records():
            for start, end in _cuts(record["text"]):
                part = record["text"][start:end]
                done += end - start
                yield Piece(text=part, ends_document=end == len(record["text"]), held_out=None, done=done)

    def _record_pieces(self) -> Iterator[Piece]:
        field = self._source.text_field
        for number, (record, held_out) in enumerate(
            zip(self._records(), held_out_records(self._source.held_out), strict=False), start=1
        ):
            text = record.get(field)
            if not isinstance(text, str):
                raise TrainingFailed(self._bad_record(number, record))
            for start, end in _cuts(text):
                ends = end == len(text)
                yield Piece(text=text[start:end], ends_document=ends, held_out=held_out, done=number)

    def _bad_record(self, number: int, record: dict[str, Any]) -> str:
        field, files = self._source.text_field, ", ".join(self._source.files)
        if field not in record:
            there = ", ".join(sorted(record)) or "none"
            return (
                f"records of {files} have no field {field}: they have {there}; set text_field to one of them"
            )
        came = type(record[field]).__name__
        return f"record {number} of {files} holds {came} in field {field}, wanted text"

    def _records(self) -> Iterator[dict[str, Any]]:
        if self._source.format == "dataset":
            for path in self._paths:
                yield from _saved_dataset(path)
            return
        try:
            yield from self._stream(self._paths)
        except (ValueError, OSError) as error:  # pyarrow's and codec errors; they do not name the file
            path, reason = self._culprit() or (self._paths[0], str(error))
            wanted = {"text": "UTF-8 text", "jsonl": "one JSON object a line", "parquet": "Parquet"}
            raise TrainingFailed(
                f"{path} is not {wanted[self._source.format]}: {reason}; mend it, or leave it out of the "
                "data set's files"
            ) from error

    def _stream(self, paths: list[Path]) -> Iterable[dict[str, Any]]:
        from datasets import load_dataset

        # streaming reads the files where they are; otherwise datasets copies them into its own cache first
        options = {"text": {"sample_by": "document"}}.get(self._source.format, {})
        kind = {"text": "text", "jsonl": "json", "parquet": "parquet"}[self._source.format]
        names = [glob.escape(str(path)) for path in paths]
        stream: Iterable[dict[str, Any]] = load_dataset(
            kind, data_files={"train": names}, split="train", streaming=True, **options
        )
        return stream

    def _culprit(self) -> tuple[Path, str] | None:
        for path in self._paths:
            try:
                for _ in self._stream([path]):
                    pass
            except (ValueError, OSError) as error:
                return path, str(error)
        return None


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
            kind = "directory" if source.format == "dataset" else "file"
            raise TrainingFailed(
                f"no {kind} matches {pattern}: correct the data set's files in the site's config"
            )
        paths += found
    return list(dict.fromkeys(paths))


def _saved_dataset(path: Path) -> Iterable[dict[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise TrainingFailed(f"{path} is not a directory that the datasets library saved: {error}") from error
    if isinstance(data, DatasetDict):
        if "train" not in data:
            raise TrainingFailed(
                f"{path} holds the splits {', '.join(sorted(data))} and no train: name one of their folders"
            )
        data = data["train"]
    records: Iterable[dict[str, Any]] = data
    return records


def _cuts(text: str) -> Iterator[tuple[int, int]]:
    """Where to cut a long text: after a line's end where there is one, so that no word is torn."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        newline = text.rfind("\n", start, start + PIECE_CHARACTERS)
        end = newline + 1 if newline >= start else start + PIECE_CHARACTERS
        yield start, end
        start = end
    if start < len(text):
        yield start, len(text)
