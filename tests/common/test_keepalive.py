"""Lines that lie idle for an hour, and lines that swallow everything."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from faults.proxy import Fault, Plan, Proxy, Way

from fedloom_common.channels import CHANNEL_OPTIONS, SERVER_OPTIONS

Options = Sequence[tuple[str, int]]
METHOD = "/test.Session/Attach"
NAT_FORGETS_MS = 5 * 60_000  # common for home routers and clouds' load balancers; some forget after 4 minutes
GRPC_PERMITS_MS = 300_000  # between pings without data, if a server does not say otherwise


class Ends:
    """When each end of a session heard that it was over."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.server_s = asyncio.get_running_loop().create_future()
        self.client_s = asyncio.get_running_loop().create_future()
        self.error: grpc.aio.AioRpcError | None = None

    async def attach(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """The server's side: it speaks once, and then has nothing to say."""
        context.add_done_callback(lambda _: self.server_s.set_result(time.monotonic()))
        yield b"welcome"
        await asyncio.Event().wait()

    async def attend(self, channel: grpc.aio.Channel) -> None:
        """The client's side."""

        async def requests() -> AsyncIterator[bytes]:
            yield b"hello"
            await asyncio.Event().wait()

        try:
            async for _ in channel.stream_stream(METHOD)(requests()):
                self.began.set()
        except grpc.aio.AioRpcError as error:
            self.error = error
        finally:
            self.client_s.set_result(time.monotonic())


@asynccontextmanager
async def idle_session(client: Options, server: Options) -> AsyncIterator[tuple[Ends, Proxy]]:
    """A session through a proxy over which nothing is said once it has begun."""
    ends = Ends()
    listener = grpc.aio.server(options=server)
    handlers = {"Attach": grpc.stream_stream_rpc_method_handler(ends.attach)}
    listener.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Session", handlers)])
    port = listener.add_insecure_port("127.0.0.1:0")
    await listener.start()
    async with (
        Proxy(port) as proxy,
        grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}", options=client) as channel,
    ):
        attending = asyncio.create_task(ends.attend(channel))
        await asyncio.wait_for(ends.began.wait(), 60)
        yield ends, proxy
        attending.cancel()
        await asyncio.wait([attending])
    await listener.stop(None)


def faster(options: Options, factor: int) -> list[tuple[str, int]]:
    """The same rhythm at another speed; how long an answer may take is the machine's matter, and stays."""
    paced = ("grpc.keepalive_time_ms", "grpc.http2.min_ping_interval_without_data_ms")
    return [(name, value // factor if name in paced else value) for name, value in options]


def test_pings_are_frequent_enough_for_nat_and_rare_enough_for_the_server() -> None:
    client, server = dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)
    for end in (client, server):
        assert end["grpc.keepalive_time_ms"] <= NAT_FORGETS_MS / 4  # one that is lost, and some to spare
        assert end["grpc.http2.max_pings_without_data"] == 0
        assert end["grpc.keepalive_permit_without_calls"] == 1
        assert end["grpc.keepalive_timeout_ms"] == end["grpc.http2.ping_timeout_ms"] == 20_000
    assert server["grpc.http2.min_ping_interval_without_data_ms"] <= client["grpc.keepalive_time_ms"] / 2


@pytest.mark.slow
async def test_an_idle_hour_of_pings_is_not_too_many() -> None:
    stricter = dict(SERVER_OPTIONS) | {"grpc.http2.min_ping_interval_without_data_ms": GRPC_PERMITS_MS}
    async with (
        idle_session(faster(CHANNEL_OPTIONS, 120), faster(SERVER_OPTIONS, 120)) as (ours, _),
        idle_session(faster(CHANNEL_OPTIONS, 120), faster(list(stricter.items()), 120)) as (theirs, _),
    ):
        await asyncio.sleep(3600 / 120)  # 60 pings
        assert not ours.client_s.done()
        assert not ours.server_s.done()
        # What would happen without our permission, or else this test sees nothing.
        assert theirs.error is not None
        assert theirs.error.details() == "Too many pings"


@pytest.mark.slow
async def test_both_ends_notice_a_line_that_swallows_everything() -> None:
    async with idle_session(CHANNEL_OPTIONS, SERVER_OPTIONS) as (ends, proxy):
        proxy.plan(*(Plan(way=way, at_bytes=0, fault=Fault.BLACKHOLE) for way in Way))
        began_s = time.monotonic()
        # A ping after a minute at the latest, and 20 s for its answer; the rest is for a busy machine.
        ended_s = await asyncio.wait_for(asyncio.gather(ends.client_s, ends.server_s), 120)
        assert min(ended_s) > began_s
        assert ends.error is not None
        assert ends.error.code() is grpc.StatusCode.UNAVAILABLE
