"""Texts as one long row of tokens, cut into blocks: the examples of language models."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from fedloom_client.training.documents import Piece, documents
from fedloom_client.training.examples import Field, Packed
from fedloom_client.training.records import Records
from fedloom_client.training.tasks import TextTask

BATCH_CHARACTERS = 1 << 20  # enough texts in one call for a tokenizer's threads

_PARTS = {False: "train", True: "held_out"}


def pack_blocks(
    records: Records, task: TextTask, folder: Path, on_progress: Callable[[int, int], None]
) -> Packed:
    """Tokenise texts into ``train`` and ``held_out`` of a folder.

    Raises:
        TrainingFailed: a file cannot be read, or holds no text.
    """
    field = Field("input_ids", "uint16" if task.tokens <= 1 << 16 else "int32", task.block_tokens)
    with _Writer(folder, field, task.separator, records.source.held_out) as writer:
        for batch in _batches(documents(records)):
            encoded = task.encode_texts([piece.text for piece in batch])
            for piece, tokens in zip(batch, encoded, strict=True):
                writer.add(piece, tokens)
            on_progress(batch[-1].done, records.total)
        writer.sync()
    return Packed(fields=[field], largest={field.name: writer.largest_token})


class _Writer:
    """The two streams of tokens, on disk as they grow."""

    def __init__(self, folder: Path, field: Field, end_token: int, held_out_share: float) -> None:
        for part in _PARTS.values():
            (folder / part).mkdir()
        self._files = {held: field.path(folder / part).open("w+b") for held, part in _PARTS.items()}
        self._dtype, self._end, self._share = np.dtype(field.dtype), end_token, held_out_share
        self._document_tokens = 0
        self.largest_token = end_token

    def add(self, piece: Piece, tokens: Sequence[int]) -> None:
        file = self._files[piece.held_out or False]
        file.write(np.array(tokens, self._dtype).tobytes())
        self._document_tokens += len(tokens)
        self.largest_token = max(self.largest_token, max(tokens, default=0))
        if piece.ends_document:
            file.write(self._end_bytes())
            if piece.held_out is None:
                self._move_tail()
            self._document_tokens = 0

    def sync(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def _move_tail(self) -> None:
        """Take the end of the document just written out of training, without having held it in memory."""
        tail_tokens = round(self._document_tokens * self._share)
        if tail_tokens == 0:
            return
        train, held_out = self._files[False], self._files[True]
        cut = train.tell() - (tail_tokens + 1) * self._dtype.itemsize
        train.seek(cut)
        shutil.copyfileobj(train, held_out)
        train.seek(cut)
        train.truncate()
        train.write(self._end_bytes())

    def _end_bytes(self) -> bytes:
        return np.array(self._end, self._dtype).tobytes()


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
