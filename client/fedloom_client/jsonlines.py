"""Files with one JSON object a line: what training and `fedloom data split` make of them."""

import codecs
import errno
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from zstandard import ZstdError

from fedloom_client.zstdfiles import register_zstd

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, BadZipFile, ZstdError)
"""What reading a file may raise that is compressed, or is not although its name says so."""


class BadLine(ValueError):
    """A line is no record; the message's first line names the place, and quotes nothing of it."""


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, by their numbers from 1; of a compressed file those within.

    Memory: one line.

    Raises:
        OSError: the file cannot be read, or is not compressed as its name says.
    """
    from fsspec.implementations.local import LocalFileSystem  # as the datasets library does

    register_zstd()
    try:
        with LocalFileSystem().open(str(path), "rb", compression="infer") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:  # a mark is a file's, and must not come to lie within another
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise OSError(errno.EIO, str(error), str(path)) from error


def record_of(line: bytes, place: str) -> dict[str, Any]:
    """A line's object, with the values that JSON gives them: a date is a text.

    Raises:
        BadLine: it is no object, or no text of UTF-8.
    """
    return require_object(value_of(line, place), place)


def value_of(content: bytes, place: str) -> Any:
    """What JSON stands for.

    Raises:
        BadLine: it is none, or no text of UTF-8.
    """
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise BadLine(f"{place} is not JSON in UTF-8: mend it, or leave it out\n{error}") from error


def require_object(value: object, place: str) -> dict[str, Any]:
    """The value, if it is an object.

    Raises:
        BadLine: it is not.
    """
    if not isinstance(value, dict):
        raise BadLine(f"{place} is {type(value).__name__}, wanted a JSON object: mend it, or leave it out")
    return value
