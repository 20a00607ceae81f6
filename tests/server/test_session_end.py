"""Claims about the moment in which a session ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom_common.identity import Peer, Role
from fedloom_server.rpc.federation import FederationEdge


class FragileCall:
    """A call's context, of which nothing may be asked after its end: gRPC would end the process."""

    has_ended = False
    asked_too_late = 0


class Access:
    def peer(self, call: FragileCall) -> Peer:
        call.asked_too_late += call.has_ended
        return Peer(Role.SITE, "oslo")

    def certificate(self, call: FragileCall) -> None:
        call.asked_too_late += call.has_ended


@pytest.mark.parametrize("turns", range(8))
async def test_a_message_that_comes_as_its_session_ends_asks_nothing_of_the_call(bench, turns, monkeypatch):
    call = FragileCall()
    call.peer = lambda: "ipv4:127.0.0.1:1"
    message_comes = asyncio.Event()

    async def requests() -> AsyncIterator[pb.SiteMessage]:
        yield pb.SiteMessage(hello=pb.Hello(protocol_version=1))
        await message_comes.wait()
        yield pb.SiteMessage(heartbeat=pb.Heartbeat())
        await asyncio.Event().wait()

    session: Any = _edge(bench, monkeypatch).Attach(requests(), call)
    async with aclosing(session):
        await anext(session)
        await asyncio.sleep(0.05)
        message_comes.set()
        for _ in range(turns):
            await asyncio.sleep(0)
    call.has_ended = True
    await asyncio.sleep(0.05)
    assert call.asked_too_late == 0


def _edge(bench: Any, monkeypatch: pytest.MonkeyPatch) -> FederationEdge:
    quiet = SimpleNamespace(attached=lambda *told, **facts: None, detached=lambda site: None)
    log = SimpleNamespace(audit_often=lambda *told, **facts: None)
    endings = SimpleNamespace(end=lambda *told: True)
    gate = SimpleNamespace(access=Access(), endings=endings, trust=None)
    return FederationEdge(
        gate, bench.running.sites, quiet, log, heartbeat_s=10, model_name="model.safetensors"
    )
