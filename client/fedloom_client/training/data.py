"""Packed training and held-out examples: made once from the site's texts, then mapped into memory."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from fedloom_client.training.documents import Documents, Piece
from fedloom_common.errors import TrainingFailed
from fedloom_common.files import write_text

BATCH_CHARACTERS = 1 << 20  # enough texts in one call for a tokenizer's threads

PACKED_KEPT = 3  # of one data set: runs with different tokenizers take turns at a site
LOCK_POLL_S = 0.2  # so that a cancel is heard while another run's group packs

_PARTIAL = ".partial-"

Blocks = NDArray[Any]
"""Examples: [number, context_tokens], uint16 or int32."""


@dataclass(frozen=True, kw_only=True)
class PackedData:
    """A data set as blocks of tokens.

    Memory: pages that are being read; all ranks of a host share them.
    """

    train: Blocks
    held_out: Blocks
    largest_token: int

    @classmethod
    def open(cls, folder: Path) -> "PackedData":
        """Map what ``pack`` wrote."""
        facts = json.loads((folder / "facts.json").read_text())
        return cls(
            train=_map(folder / "train.bin", facts),
            held_out=_map(folder / "held_out.bin", facts),
            largest_token=facts["largest_token"],
        )


def pack(
    documents: Documents,
    assets: Path,
    context_tokens: int,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> Path:
    """Tokenise and pack the documents under ``folder``, unless that has been done; the place of the result.

    Raises:
        TrainingFailed: the files or the tokenizer are unfit.
    """
    key = hashlib.sha256(f"{documents.fingerprint()} {_digest(assets)} {context_tokens}".encode()).hexdigest()
    packed = folder / key[:32]
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder, lambda: on_progress(0, documents.total)):
        if not packed.is_dir():
            _drop_old(folder)
            partial = Path(tempfile.mkdtemp(dir=folder, prefix=_PARTIAL))
            _build(documents, _tokenizer(assets), context_tokens, partial, on_progress)
            partial.rename(packed)
        packed.touch()
    return packed


def refuse_remote_code(assets: Path) -> None:
    """Check that no file asks for Python code that came with the model.

    Raises:
        TrainingFailed: a file has an auto_map.
    """
    for name in ("config.json", "tokenizer_config.json"):
        file = assets / name
        if file.is_file() and "auto_map" in json.loads(file.read_text()):
            raise TrainingFailed(
                f"the model's {name} has an auto_map, which asks to run code that came with the model: sites "
                "never do; use a model type that transformers itself has"
            )


@contextmanager
def _alone_in(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Keep out the worker groups of other runs that train on the same data set; a kill lets them in."""
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(LOCK_POLL_S)
        yield


def _drop_old(folder: Path) -> None:
    """Remove what a kill left, and all but the last of other texts, tokenizers and context lengths."""
    folders = [path for path in folder.iterdir() if path.is_dir()]
    folders.sort(key=lambda path: (path.name.startswith(_PARTIAL), -path.stat().st_mtime_ns))
    for number, old in enumerate(folders, start=1):
        if number >= PACKED_KEPT or old.name.startswith(_PARTIAL):
            shutil.rmtree(old)  # ranks that map it keep their pages


class _Writer:
    """The two streams of tokens, on disk as they grow."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], end_token: int, held_out_share: float) -> None:
        self._files = {held: (folder / name).open("w+b") for held, name in _NAMES.items()}
        self._dtype, self._end, self._share = dtype, end_token, held_out_share
        self._document_tokens = 0
        self.largest_token = end_token

    def add(self, piece: Piece, tokens: list[int]) -> None:
        file = self._files[piece.held_out or False]
        file.write(np.array(tokens, self._dtype).tobytes())
        self._document_tokens += len(tokens)
        self.largest_token = max(self.largest_token, max(tokens, default=0))
        if piece.ends_document:
            file.write(self._end_bytes())
            if piece.held_out is None:
                self._move_tail()
            self._document_tokens = 0

    def finish(self) -> dict[bool, int]:
        """Tokens in the held-out (True) and the training (False) stream, now on disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {held: file.tell() // self._dtype.itemsize for held, file in self._files.items()}

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


_NAMES = {False: "train.bin", True: "held_out.bin"}


def _build(
    documents: Documents,
    tokenizer: Any,
    context_tokens: int,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)
    with _Writer(folder, dtype, tokenizer.eos_token_id, documents.held_out_share) as writer:
        for batch in _batches(documents):
            texts = [piece.text for piece in batch]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for piece, tokens in zip(batch, encoded["input_ids"], strict=True):
                writer.add(piece, tokens)
            on_progress(batch[-1].done, documents.total)
        counts = writer.finish()
    facts = {
        "dtype": dtype.name,
        "context_tokens": context_tokens,
        "train.bin": counts[False],
        "held_out.bin": counts[True],
        "largest_token": writer.largest_token,
    }
    write_text(folder / "facts.json", json.dumps(facts))


def _batches(documents: Documents) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in documents:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _map(file: Path, facts: dict[str, Any]) -> Blocks:
    context = facts["context_tokens"]
    number = facts[file.name] // context
    if number == 0:  # an empty file cannot be mapped
        return np.empty((0, context), facts["dtype"])
    return np.memmap(file, facts["dtype"], mode="r", shape=(number, context))


def _tokenizer(assets: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(assets), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TrainingFailed(f"the model's tokenizer does not load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise TrainingFailed(
            "the model's tokenizer has no end-of-text token (eos_token) to put between documents"
        )
    return tokenizer


def _digest(assets: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(assets.iterdir()):
        if file.is_file() and file.name != "config.json":
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()
