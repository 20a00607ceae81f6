"""Hundreds of sites in this process: each has a certificate, a connection and a session, and does no work."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Self

import grpc
from faults.federation import Federation

from fedloom.v1 import session_pb2 as pb
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom_common.authority import Authority
from fedloom_common.channels import CHANNEL_OPTIONS
from fedloom_common.identity import Role

BEAT_S = 5.0


class Crowd:
    """Sites that attach all at once, each time they are told to."""

    def __init__(self, federation: Federation, count: int) -> None:
        authority = Authority.load(federation.kit / "ca")
        self._address = f"localhost:{federation.port}"
        self._credentials = [
            grpc.ssl_channel_credentials(authority.certificate, made.key, made.certificate)
            for made in (authority.issue(Role.SITE, f"site{number:04}") for number in range(count))
        ]
        self._sessions: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        for session in self._sessions:
            session.cancel()
        await self.gone()

    def attach(self) -> None:
        """Begin every session now; one that the coordinator does not take yet is tried again each second."""
        self._sessions = [asyncio.create_task(self._attend(one)) for one in self._credentials]

    async def gone(self) -> None:
        """Wait until every session has ended."""
        await asyncio.gather(*self._sessions, return_exceptions=True)

    async def _attend(self, credentials: grpc.ChannelCredentials) -> None:
        attached = False
        while not attached:
            async with grpc.aio.secure_channel(self._address, credentials, CHANNEL_OPTIONS) as channel:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in FederationServiceStub(channel).Attach(_messages()):
                        attached = True
            await asyncio.sleep(1)


async def _messages() -> AsyncIterator[pb.SiteMessage]:
    data = [pb.DataSet(name="texts", size_bytes=1000)]
    yield pb.SiteMessage(hello=pb.Hello(protocol_version=1, software="crowd", data_sets=data))
    while True:
        await asyncio.sleep(BEAT_S)
        yield pb.SiteMessage(heartbeat=pb.Heartbeat())
