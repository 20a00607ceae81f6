"""Digests: the names of files by their content.

BLAKE3, since a round hashes every model and update at both ends: it takes a third of SHA-256's time.
Source: O'Connor et al. 2020, https://github.com/BLAKE3-team/BLAKE3-specs.
"""

import re
from pathlib import Path

from blake3 import blake3

DIGEST = "blake3: and 64 hexadecimal digits"
"""What a digest looks like, for error messages."""

_PIECE_BYTES = 1 << 20  # stays in a core's cache between the read and the hash
_PATTERN = re.compile(r"blake3:[0-9a-f]{64}")


class Digest:
    """The digest of bytes that come in pieces."""

    def __init__(self) -> None:
        self._hash = blake3()

    def add(self, piece: bytes | bytearray | memoryview) -> None:
        """The next bytes."""
        self._hash.update(piece)

    def __str__(self) -> str:
        """The digest of all so far."""
        return f"blake3:{self._hash.hexdigest()}"


def is_digest(text: str) -> bool:
    """Whether a text can be a file's digest."""
    return _PATTERN.fullmatch(text) is not None


def digest_of_file(path: Path) -> str:
    """The digest of a file.

    Memory: 1 MiB.
    """
    digest, piece = Digest(), memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.add(piece[:count])
    return str(digest)


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file is there and is what its digest says."""
    return path.exists() and digest_of_file(path) == digest


def plain_name(digest: str) -> str:
    """A digest as a file's name: "blake3-…"."""
    return digest.replace(":", "-")


def digest_of_name(name: str) -> str:
    """The digest that a file's plain name tells."""
    return name.replace("-", ":", 1)
