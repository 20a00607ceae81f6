"""The message Chunk of transfer.proto, encoded and decoded by hand.

The bytes are what protobuf makes, and whatever protobuf makes is read; but a payload is never copied
into a message object, which halves the CPU time of a transfer.
"""

from dataclasses import dataclass

from crc32c import crc32c as crc32c_of
from google.protobuf.message import DecodeError

from fedloom.v1.transfer_pb2 import Chunk as ChunkMessage
from fedloom_common.errors import BadChunk, ProtocolError

# Smaller ones cost CPU (64 KiB three times as much), larger ones make a slow link less responsive.
CHUNK_BYTES = 1 << 20

_UPLOAD, _OFFSET, _CRC32C, _PAYLOAD = 0x0A, 0x10, 0x1D, 0x22  # field number << 3 | wire type
_VARINT_BYTES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A piece of a file on its way."""

    payload: bytes | memoryview
    offset: int
    """Place of the first byte in the file."""
    crc32c: int
    upload: str = ""
    """The upload that the chunk opens; empty in all further chunks, and on the way down."""

    @classmethod
    def of(cls, payload: bytes | memoryview, offset: int, upload: str = "") -> "Chunk":
        """A chunk with its checksum."""
        crc32c = crc32c_of(payload)
        return cls(payload=payload, offset=offset, crc32c=crc32c, upload=upload)

    @classmethod
    def decode(cls, message: bytes) -> "Chunk":
        """Read a message; the payload is a view of it wherever fields come once and in order.

        Raises:
            ProtocolError: the bytes are no Chunk.
        """
        return _decode_ordered(message) or _decode_any(message)

    def encode(self) -> bytes:
        """The message, as protobuf encodes it. The payload is copied once."""
        upload = self.upload.encode()
        head = bytearray()
        if upload:
            head.append(_UPLOAD)
            _add_varint(head, len(upload))
            head += upload
        if self.offset:
            head.append(_OFFSET)
            _add_varint(head, self.offset)
        if self.crc32c:
            head.append(_CRC32C)
            head += self.crc32c.to_bytes(4, "little")
        if self.payload:
            head.append(_PAYLOAD)
            _add_varint(head, len(self.payload))
        return b"".join((head, self.payload))

    @property
    def end(self) -> int:
        """Place behind the last byte in the file."""
        return self.offset + len(self.payload)

    def require_intact(self) -> None:
        """Check the payload against its checksum.

        Raises:
            BadChunk: they differ.
        """
        came = crc32c_of(self.payload)
        if came != self.crc32c:
            raise BadChunk(
                f"the chunk at byte {self.offset} is corrupt: its CRC-32C is {came:08x}, "
                f"its sender said {self.crc32c:08x}"
            )


def _decode_ordered(message: bytes) -> Chunk | None:
    """A chunk as we and protobuf write it: each field at most once, in order, a payload; None for others."""
    place, upload, offset, crc32c = 0, b"", 0, 0
    try:
        if message[place] == _UPLOAD:
            length, place = _read_varint(message, place + 1)
            upload, place = message[place : place + length], place + length
        if message[place] == _OFFSET:
            offset, place = _read_varint(message, place + 1)
        if message[place] == _CRC32C:
            crc32c, place = int.from_bytes(message[place + 1 : place + 5], "little"), place + 5
        if message[place] != _PAYLOAD:
            return None
        length, place = _read_varint(message, place + 1)
        name = upload.decode()
    except (IndexError, UnicodeDecodeError):
        return None
    if place + length != len(message):
        return None
    return Chunk(payload=memoryview(message)[place:], offset=offset, crc32c=crc32c, upload=name)


def _decode_any(message: bytes) -> Chunk:
    try:
        chunk = ChunkMessage.FromString(message)
    except DecodeError as error:
        raise ProtocolError(
            f"the message is not of the contract: its {len(message)} bytes are no Chunk ({error})"
        ) from error
    return Chunk(payload=chunk.payload, offset=chunk.offset, crc32c=chunk.crc32c, upload=chunk.upload)


def _add_varint(encoded: bytearray, number: int) -> None:
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    """A number, and the place behind it; IndexError if it is not one of 64 bits."""
    number = 0
    for group in range(_VARINT_BYTES):
        byte = message[place + group]
        number |= (byte & 0x7F) << 7 * group
        if byte < 0x80:
            if number >> 64:
                raise IndexError
            return number, place + group + 1
    raise IndexError
