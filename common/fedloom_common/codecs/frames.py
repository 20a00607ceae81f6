"""zstd frames of byte planes.

The low bytes of a model's changes are noise and the high ones repeat, so the
bytes of a value are compressed apart: bf16 shrinks to 1/2.9 of fp32 instead of
1/2.5, and noise is passed over at memory speed. Matches are hardly looked for:
in noise they are chance, and finding them costs three times the time for a
larger result. That leaves entropy coding, and runs.
Source: RFC 8878; byte planes after the shuffle filter of Masui et al. 2015, arXiv:1503.00638.
"""

import numpy as np
import zstandard

from fedloom_common.codecs.values import PIECE_VALUES, Raw
from fedloom_common.errors import BadTensor

_BLOCK_BYTES = 1 << 17


def bound_bytes(size_bytes: int) -> int:
    """The largest frame that so many bytes can become."""
    return size_bytes + (size_bytes >> 8) + (max(_BLOCK_BYTES - size_bytes, 0) >> 11)


class Frames:
    """Compresses and decompresses byte planes, one frame for each."""

    def __init__(self) -> None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1, source_size=PIECE_VALUES, min_match=7, hash_log=6, write_content_size=True
        )
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor()
        self._plane = np.empty(PIECE_VALUES * 4, np.uint8)

    def compress(self, raw: Raw, planes: int) -> list[bytes]:
        """A frame for each plane, that of the lowest bytes first."""
        if planes == 1:
            return [self._compressor.compress(raw.data)]
        elements = raw.view(f"<u{planes}")
        plane, frames = self._plane[: len(elements)], []
        for place in range(planes):
            np.copyto(plane, elements >> (8 * place), casting="unsafe")
            frames.append(self._compressor.compress(plane.data))
        return frames

    def decompress(self, frames: list[memoryview], planes: int, raw: Raw) -> None:
        """Fill ``raw`` from the frames of its planes.

        Raises:
            BadTensor: a frame is not zstd, or holds more or fewer bytes than its plane; its own
                claim is checked before it gets any memory.
        """
        if planes == 1:
            np.copyto(raw, self._plane_of(frames[0], len(raw)))
            return
        elements = raw.view(f"<u{planes}")
        np.copyto(elements, self._plane_of(frames[-1], len(elements)))
        for frame in reversed(frames[:-1]):
            np.left_shift(elements, 8, out=elements)
            np.bitwise_or(elements, self._plane_of(frame, len(elements)), out=elements)

    def _plane_of(self, frame: memoryview, size_bytes: int) -> Raw:
        try:
            claimed = zstandard.frame_content_size(frame)
            if claimed != size_bytes:
                raise BadTensor(f"a zstd frame says that it holds {claimed} bytes, wanted {size_bytes}")
            plane = self._decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise BadTensor(f"a zstd frame cannot be read: {error}") from error
        return np.frombuffer(plane, np.uint8)
