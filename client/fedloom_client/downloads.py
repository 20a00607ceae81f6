"""Fetching files from the coordinator for as long as it takes."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import grpc

from fedloom_client.backoff import Backoff
from fedloom_client.messages import Blob
from fedloom_common.errors import (
    BadChunk,
    BadSpec,
    NotIdentified,
    StorageUnavailable,
    TooManyCalls,
    Unreachable,
)
from fedloom_common.pace import Pace
from fedloom_common.transfer import TransferStub, download

CORRUPT_LIMIT = 3  # a digest that differs so often is not the line's fault
_PASSING = (Unreachable, StorageUnavailable, TooManyCalls, BadSpec, NotIdentified)
"""What is waited for; the last two tell of certificates, which may be renewed."""

logger = logging.getLogger(__name__)


class Downloads:
    """Files of the coordinator, by digest."""

    def __init__(self, connect: Callable[[], grpc.aio.Channel], pace: Pace) -> None:
        self._connect = connect
        self._pace = pace

    async def fetch(self, blob: Blob, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Bring a file here; a coordinator that cannot give it now is waited for.

        Raises:
            FederationError: the coordinator does not give the file, or its bytes are wrong.
            StorageFull: the disk is full.
        """
        backoff, corrupt = Backoff(), 0
        while True:
            try:
                # A channel of its own: grpc's pause between connects, up to 2 minutes, begins anew with it.
                async with self._connect() as channel:
                    stub = TransferStub(channel)
                    return await download(
                        stub, blob.digest, blob.size_bytes, path, on_bytes=on_bytes, pace=self._pace
                    )
            except _PASSING as error:
                logger.warning(
                    "a download waits for the coordinator", extra={"file": blob.name, "error": str(error)}
                )
            except BadChunk as error:
                corrupt += 1
                if corrupt == CORRUPT_LIMIT:
                    raise
                logger.warning("a download was corrupt", extra={"file": blob.name, "error": str(error)})
            await asyncio.sleep(backoff.next_s())
