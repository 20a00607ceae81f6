"""The calls under way; when the coordinator drains no other begins, and these may finish."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fedloom_common.errors import Unreachable

ENDLESS = frozenset({
    "/fedloom.v1.FederationService/Attach",
    "/fedloom.v1.RunService/Watch",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
})  # fmt: skip
"""Calls that last as long as their caller wants: nobody waits for their end."""

HEALTH = "/grpc.health.v1.Health/"
READ, WRITE = "/fedloom.v1.TransferService/Read", "/fedloom.v1.TransferService/Write"


class Calls:
    """Counts calls by method, and keeps new ones out while the coordinator drains."""

    def __init__(self) -> None:
        self.under_way: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        """Those of them that wait their turn."""
        self.is_draining = False
        self._fewer = asyncio.Event()

    @contextmanager
    def counted(self, method: str) -> Iterator[None]:
        """A call, from its begin to its end.

        Raises:
            Unreachable: the coordinator drains.
        """
        if self.is_draining and not method.startswith(HEALTH):
            raise Unreachable("the coordinator is going away for a restart; try again in a moment")
        self.under_way[method] += 1
        try:
            yield
        finally:
            self.under_way[method] -= 1
            self._fewer.set()

    @contextmanager
    def waiting_in(self, method: str) -> Iterator[None]:
        """A call that is under way and waits inside the block."""
        self.waiting[method] += 1
        try:
            yield
        finally:
            self.waiting[method] -= 1

    def drain(self) -> None:
        """Let no call begin any more, but those that ask for health."""
        self.is_draining = True

    async def until_ended(self) -> None:
        """Wait until every call that ends by itself has ended."""
        while any(count for method, count in self.under_way.items() if method not in ENDLESS):
            self._fewer.clear()
            await self._fewer.wait()
