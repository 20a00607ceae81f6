"""Files of zstd frames, of which one that is cut is an error: fsspec's own reader takes a cut for the end."""

from io import BufferedReader, RawIOBase
from typing import IO

from zstandard import ZstdDecompressor

READ_BYTES = 8 << 10  # little, since all that it unpacks to is in memory at once


def register_zstd() -> None:
    """Have fsspec, and the datasets library with it, read files of zstd by this module."""
    from fsspec.compression import register_compression

    register_compression("zstd", _open, "zst", force=True)


def _open(file: IO[bytes], mode: str = "rb") -> BufferedReader:
    assert "r" in mode, "sites only read data"
    return BufferedReader(_ZstdFile(file))


class _ZstdFile(RawIOBase):
    """What the frames of a file hold, one after another.

    Raises:
        EOFError: the file ends within a frame, or has none.
        ZstdError: it is not zstd.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._frame = file, ZstdDecompressor().decompressobj()
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # all that BufferedReader gives
        while not self._held:
            packed = self._frame.unused_data or self._file.read(READ_BYTES)
            if not packed and self._frame.eof:
                return 0
            if not packed:
                raise EOFError("the file ends within a zstd frame: a part of it is missing")
            if self._frame.eof:
                self._frame = ZstdDecompressor().decompressobj()
            self._held = memoryview(self._frame.decompress(packed))
        piece, self._held = self._held[: len(buffer)], self._held[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()
