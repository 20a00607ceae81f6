"""Claims about what stands before and behind every handler, with handlers made for the purpose."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from fedloom_common.channels import SERVER_OPTIONS, open_channel
from fedloom_common.errors import NotPermitted
from fedloom_common.identity import Peer, Role
from fedloom_server.config import Limits
from fedloom_server.rpc import guard
from fedloom_server.rpc.access import Access
from fedloom_server.rpc.calls import Calls
from fedloom_server.rpc.caps import Caps
from fedloom_server.rpc.endings import Endings, current_call
from fedloom_server.rpc.guard import Guard

ATTACH = "/fedloom.v1.FederationService/Attach"
LARGE = b"\0" * (1 << 20)  # more than gRPC takes from us while the peer reads nothing


class Edge:
    """A session that says the same large thing for ever."""

    def __init__(self) -> None:
        access = Access(insecure=True)
        self.endings = Endings(access)
        self.guard = Guard(access, Caps(Limits()), Calls(), self.endings, Quiet())
        self.call: asyncio.Task[object]
        self.said = 0
        self.fault: Exception | None = None

    async def attach(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        self.call = current_call()
        await anext(requests)
        if self.fault is not None:
            raise self.fault
        while True:
            self.said += 1
            yield LARGE

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(self.attach)


class Quiet:
    def audit_often(self, *told: object, **facts: object) -> None: ...


@asynccontextmanager
async def serving(edge: Edge) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[edge.guard], options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers([edge])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", None, Peer(Role.SITE, "oslo")) as channel:
            yield channel
    finally:
        await server.stop(None)


async def stuck(edge: Edge) -> None:
    """Returns once what the edge says goes nowhere any more."""
    said = -1
    async with asyncio.timeout(60):
        while edge.said != said or said == 0:
            said = edge.said
            await asyncio.sleep(0.3)


@pytest.mark.parametrize("reads", [0, 2])
async def test_a_call_that_is_ended_while_it_writes_tells_its_peer_why(reads, caplog):
    edge = Edge()
    async with serving(edge) as channel:
        call = channel.stream_stream(ATTACH)(iter([b""]))
        for _ in range(reads):
            assert await call.read() == LARGE
        await stuck(edge)
        assert edge.endings.end(edge.call, NotPermitted("out with you"))
        with pytest.raises(grpc.aio.AioRpcError, match="out with you") as caught:
            async with asyncio.timeout(60):
                while await call.read() is not grpc.aio.EOF:
                    pass
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert [line for line in caplog.records if line.levelno >= logging.ERROR] == []


async def test_a_line_that_breaks_while_a_call_writes_is_one_line_of_the_log_and_no_error(caplog):
    caplog.set_level(logging.INFO, "fedloom_server")
    edge = Edge()
    async with serving(edge) as channel:
        call = channel.stream_stream(ATTACH)(iter([b""]))
        await call.read()
        await stuck(edge)
        await channel.close()
        async with asyncio.timeout(60):
            await asyncio.wait([edge.call])
    told = [line for line in caplog.records if line.name != "fedloom_common.channels"]
    assert [(line.levelname, line.message) for line in told] == [
        ("INFO", "the line broke while a message was sent")
    ]


async def test_a_message_that_cannot_be_sent_on_a_line_that_holds_is_an_error(caplog, monkeypatch):
    monkeypatch.setattr(guard, "LOST_S", 0.1)
    edge = Edge()
    edge.fault = grpc.aio.InternalError("two messages at once")
    async with serving(edge) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="the coordinator's log has its cause"):
            await asyncio.wait_for(channel.stream_stream(ATTACH)(iter([b""])).read(), 60)
    assert "two messages at once" in caplog.text


@pytest.mark.parametrize("is_there", [True, False])
async def test_headers_of_a_call_that_is_ended_are_seen_through(is_there):
    sent = asyncio.Event()
    told: list[str] = []

    class Line:
        async def send_initial_metadata(self, metadata: object) -> None:
            await sent.wait()
            told.append("whole")
            if not is_there:
                raise grpc.aio.InternalError("the line has broken")

    lost: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: lost.append(context))
    sending: asyncio.Task[None] = asyncio.create_task(guard._send_headers(Line()))
    await asyncio.sleep(0)
    sending.cancel()
    await asyncio.sleep(0)
    sent.set()
    await asyncio.wait([sending])
    assert sending.cancelled()
    del sending
    gc.collect()  # a task's error that nobody asked for is told when the task goes
    assert (told, lost) == (["whole"], [])
