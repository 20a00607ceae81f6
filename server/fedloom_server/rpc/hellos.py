"""A session's first message: what a site says of itself, cut to what is kept and shown."""

import asyncio
from collections.abc import AsyncIterator

from fedloom.v1 import session_pb2 as pb
from fedloom_common.errors import ProtocolError
from fedloom_common.requirements import MOST_LABELS
from fedloom_server.admission import is_label
from fedloom_server.eligibility import Description, Device

PROTOCOL_VERSION = 1
HELLO_S = 20.0  # a peer that opened a session has so long to say who it is
# What a site may say at most: it is kept, and shown to operators.
NAME_CHARACTERS = 200
DEVICES = 256
DATA_SETS = 1000


async def read_hello(requests: AsyncIterator[pb.SiteMessage]) -> pb.Hello:
    """The Hello with which a session begins.

    Raises:
        ProtocolError: another message comes or none, or it speaks another version of the protocol.
    """
    try:
        first = await asyncio.wait_for(anext(requests), HELLO_S)
    except StopAsyncIteration:
        raise ProtocolError("a session begins with Hello; nothing came") from None
    except TimeoutError:
        raise ProtocolError(f"a session begins with Hello; nothing came in {HELLO_S:g} s") from None
    if first.WhichOneof("kind") != "hello":
        raise ProtocolError(f"a session begins with Hello; {first.WhichOneof('kind')} came")
    if first.hello.protocol_version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the site speaks protocol version {first.hello.protocol_version} ({first.hello.software}), "
            f"the coordinator version {PROTOCOL_VERSION}: install matching releases"
        )
    return first.hello


def description_of(hello: pb.Hello) -> Description:
    """What a site says of itself."""
    devices = (
        Device(kind=short(device.kind), name=short(device.name), memory_bytes=device.memory_bytes)
        for device in hello.devices[:DEVICES]
    )
    return Description(
        software=short(hello.software),
        memory_bytes=hello.memory_bytes,
        devices=tuple(devices),
        data_sets={short(data.name): data.size_bytes for data in hello.data_sets[:DATA_SETS]},
        evaluates_only=hello.evaluates_only,
    )


def labels_of(hello: pb.Hello) -> dict[str, str]:
    """A site's labels; those that are not well formed are passed over."""
    good = ((name, hello.labels[name]) for name in sorted(hello.labels))
    return dict([pair for pair in good if all(is_label(text) for text in pair)][:MOST_LABELS])


def short(text: str) -> str:
    """The beginning of a name."""
    return text[:NAME_CHARACTERS]
