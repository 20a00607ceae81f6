"""A data set as a stream of texts, in pieces that a tokenizer takes without much memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedloom_client.training.records import Records
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
    """Progress through the source at the piece's end, in the units of ``Records.total``."""


def documents(records: Records) -> Iterator[Piece]:
    """Every document in pieces.

    Memory: one document.

    Raises:
        TrainingFailed: a file cannot be read as its format, or records hold no text in the text's field.
    """
    return _of_files(records) if records.source.format == "text" else _of_records(records)


def _of_files(records: Records) -> Iterator[Piece]:
    done = 0
    for text in records.texts():
        for start, end in _cuts(text):
            done += end - start
            yield Piece(text=text[start:end], ends_document=end == len(text), held_out=None, done=done)


def _of_records(records: Records) -> Iterator[Piece]:
    for row in records.rows(("text",)):
        text = row.values["text"]
        if not isinstance(text, str):
            field = records.source.fields.get("text", "text")
            raise TrainingFailed(
                f"record {row.number} of {records.describe()} holds {type(text).__name__} in field {field}, "
                "wanted text"
            )
        for start, end in _cuts(text):
            ends = end == len(text)
            yield Piece(text=text[start:end], ends_document=ends, held_out=row.held_out, done=row.number)


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
