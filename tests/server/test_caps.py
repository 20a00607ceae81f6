"""What one peer may ask for at most."""

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from fedloom.v1 import runs_pb2, session_pb2
from fedloom.v1.runs_pb2_grpc import RunServiceStub
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.identity import Peer, Role
from fedloom_server.app import Coordinator, coordinator
from fedloom_server.config import CoordinatorConfig, Limits
from fedloom_server.rpc.access import SESSION_MESSAGE_BYTES, SPEC_BYTES
from fedloom_server.rpc.caps import LINES_AT_ONCE

ANN, WARD = Peer(Role.OPERATOR, "ann"), Peer(Role.SITE, "ward-a")
HELLO = session_pb2.SiteMessage(hello=session_pb2.Hello(protocol_version=1))


def limited(config: CoordinatorConfig, **limits: float) -> CoordinatorConfig:
    return config.model_copy(update={"limits": Limits(**limits)})


def channel(running: Coordinator, peer: Peer) -> grpc.aio.Channel:
    return open_channel(f"127.0.0.1:{running.port}", None, peer)


async def test_a_peer_that_calls_too_fast_is_refused_for_a_while_and_others_are_not(config) -> None:
    async with coordinator(limited(config, calls_per_s=5, calls_burst=3)) as running:
        async with channel(running, ANN) as mine, channel(running, Peer(Role.OPERATOR, "bob")) as other:
            stub = RunServiceStub(mine)
            with pytest.raises(grpc.aio.AioRpcError, match="more than 5 calls a second; try again") as caught:
                for _ in range(100):
                    await stub.List(runs_pb2.ListRequest())
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await RunServiceStub(other).List(runs_pb2.ListRequest())
            await asyncio.sleep(0.3)
            await stub.List(runs_pb2.ListRequest())
        actions = [(entry.actor, entry.action) for entry in running.store.audit_log.entries()]
    assert actions == [("operator ann", "call.refused")]


async def test_a_site_that_attaches_again_and_again_is_refused_for_a_while(config) -> None:
    async with coordinator(limited(config, sessions_per_minute=2)) as running, channel(running, WARD) as mine:
        for _ in range(2):
            call = FederationServiceStub(mine).Attach(iter([HELLO]))
            assert (await call.read()).WhichOneof("kind") == "welcome"
        with pytest.raises(grpc.aio.AioRpcError, match="more than 2 sessions a minute"):
            await FederationServiceStub(mine).Attach(_forever()).read()


async def test_calls_at_once_are_counted(config) -> None:
    async with coordinator(limited(config, calls_at_once=4)) as running, channel(running, WARD) as mine:
        held = [FederationServiceStub(mine).Attach(_forever()) for _ in range(4)]
        await asyncio.gather(*(call.wait_for_connection() for call in held))
        with pytest.raises(grpc.aio.AioRpcError, match="has 4 calls under way"):
            while True:
                await FederationServiceStub(mine).Attach(iter(())).read()
        for call in held:
            call.cancel()


async def _forever() -> AsyncIterator[session_pb2.SiteMessage]:
    await asyncio.sleep(600)
    yield HELLO


async def _withheld() -> AsyncIterator[bytes]:
    await asyncio.sleep(600)
    yield b""


async def test_calls_whose_message_is_withheld_are_counted_and_refused_like_others(config) -> None:
    """On the wire a single message looks like a stream of one: nobody may hold calls open before we ask."""
    async with coordinator(limited(config, calls_at_once=4)) as running, channel(running, WARD) as mine:
        query = mine.stream_unary("/fedloom.v1.TransferService/QueryWrite")
        held = [query(_withheld()) for _ in range(4)]
        await asyncio.gather(*(call.wait_for_connection() for call in held))
        with pytest.raises(grpc.aio.AioRpcError, match="has 4 calls under way"):
            while True:
                await asyncio.wait_for(query(_withheld()), 60)
        for call in held:
            call.cancel()
        with pytest.raises(grpc.aio.AioRpcError, match="may not call"):
            await asyncio.wait_for(mine.stream_unary("/fedloom.v1.RunService/Stop")(_withheld()), 60)


async def test_a_message_that_does_not_come_ends_the_call(bench, monkeypatch) -> None:
    async with channel(bench.running, ANN) as mine:
        submit = mine.stream_unary("/fedloom.v1.RunService/Submit")
        wanted = ((_withheld(), r"not come whole in 0\.05 s", 0.05), (iter(()), "none came", 60))
        for messages, reason, request_s in wanted:
            monkeypatch.setattr("fedloom_server.rpc.guard.REQUEST_S", request_s)
            with pytest.raises(grpc.aio.AioRpcError, match=reason) as caught:
                await asyncio.wait_for(submit(messages), 60)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_peer_that_is_refused_all_the_time_fills_no_log(bench, caplog) -> None:
    async with (
        channel(bench.running, WARD) as mine,
        channel(bench.running, Peer(Role.VIEWER, "bob")) as other,
    ):
        for _ in range(5 * LINES_AT_ONCE):
            with pytest.raises(grpc.aio.AioRpcError, match="may not call"):
                await RunServiceStub(mine).Stop(runs_pb2.StopRequest(run_id="x"))
        with pytest.raises(grpc.aio.AioRpcError, match="may not call"):
            await RunServiceStub(other).Stop(runs_pb2.StopRequest(run_id="x"))
    refusals = [line.peer for line in caplog.records if line.message == "call refused"]
    assert LINES_AT_ONCE <= refusals.count("site ward-a") <= 2 * LINES_AT_ONCE
    assert refusals.count("viewer bob") == 1


async def test_a_site_that_speaks_of_others_work_all_the_time_fills_no_log(bench, caplog) -> None:
    told = session_pb2.SiteMessage(progress=session_pb2.Progress(assignment_id="r.1.1.train.ward-b"))
    last = session_pb2.SiteMessage()
    last.failure.assignment_id = "r.1.1.train.ward-a"
    async with channel(bench.running, WARD) as mine, asyncio.timeout(60):
        call = FederationServiceStub(mine).Attach(_and_stay(HELLO, *[told] * 80, last))
        while (await call.read()).WhichOneof("kind") != "cancel":  # which answers the last one
            pass
        call.cancel()
    lines = [line for line in caplog.records if line.message.startswith("a site speaks of work")]
    assert len(lines) == LINES_AT_ONCE


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("r.1.1.train.ward-b", id="another's"),
        pytest.param("no such name", id="nobody's"),
        pytest.param(f"{'r' * 1000}.1.1.train.ward-a", id="too-long"),
    ],
)
async def test_a_site_that_speaks_of_no_work_of_its_own_is_given_nothing_to_read(bench, name) -> None:
    """Else what it says lies here until it reads, thousands of times."""
    told, last = session_pb2.SiteMessage(), session_pb2.SiteMessage()
    told.failure.assignment_id, last.failure.assignment_id = name, "r.1.1.train.ward-a"
    async with channel(bench.running, WARD) as mine, asyncio.timeout(60):
        call = FederationServiceStub(mine).Attach(_and_stay(HELLO, told, last))
        assert (await call.read()).WhichOneof("kind") == "welcome"
        assert (await call.read()).cancel.assignment_id == "r.1.1.train.ward-a"
        call.cancel()


async def test_a_session_that_reads_nothing_ends_when_its_site_attaches_again(bench) -> None:
    async with channel(bench.running, WARD) as mine, asyncio.timeout(60):
        first = FederationServiceStub(mine).Attach(_hello_and_stay())
        await first.read()
        link = bench.running.sites.link("ward-a")
        for _ in range(20):
            link.cancel("x" * (100 << 10), "more than HTTP/2 takes before anybody reads")
        await asyncio.sleep(0.5)
        second = FederationServiceStub(mine).Attach(_hello_and_stay())
        await second.read()
        with pytest.raises(grpc.aio.AioRpcError, match="the site has attached again"):
            while await first.read():
                pass
        second.cancel()


async def _and_stay(*messages: session_pb2.SiteMessage) -> AsyncIterator[session_pb2.SiteMessage]:
    for message in messages:
        yield message
    await asyncio.sleep(600)


async def test_connections_are_limited_before_their_handshake(config, monkeypatch) -> None:
    monkeypatch.setattr("fedloom_server.app._most_files", lambda: 8)
    monkeypatch.setattr("fedloom_server.app._open_more_files", lambda: None)
    async with coordinator(config) as running:
        open_ends = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(12)]
        greeted = [await _is_greeted(reader) for reader, _ in open_ends]
        for _, writer in open_ends:
            writer.close()
    assert greeted.count(True) <= 4


async def _is_greeted(reader: asyncio.StreamReader) -> bool:
    """Whether the other end begins to speak HTTP/2."""
    try:
        return bool(await asyncio.wait_for(reader.read(1), 5))
    except OSError:
        return False


async def test_a_message_that_is_too_large_is_refused_before_it_is_decoded(bench, caplog) -> None:
    too_large = b"\xff" * (SPEC_BYTES + 1)  # no message at all, which nobody looks at
    async with channel(bench.running, ANN) as mine:
        for raw, reason in (
            (too_large, f"of {SPEC_BYTES + 1} bytes came, /fedloom.v1.RunService/Submit takes at most"),
            (b"\xff", "its bytes cannot be decoded"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=reason) as caught:
                await mine.unary_unary("/fedloom.v1.RunService/Submit")(raw)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    failure = session_pb2.Failure(assignment_id="x", reason="y" * SESSION_MESSAGE_BYTES)
    async with channel(bench.running, WARD) as mine:
        call = FederationServiceStub(mine).Attach(iter([HELLO, session_pb2.SiteMessage(failure=failure)]))
        assert (await call.read()).WhichOneof("kind") == "welcome"
        with pytest.raises(grpc.aio.AioRpcError, match="/Attach takes at most"):
            await asyncio.wait_for(call.read(), 60)
    assert "Traceback" not in caplog.text


async def test_a_session_that_talks_too_much_is_read_no_faster_than_its_pace(config, monkeypatch) -> None:
    async with coordinator(limited(config, messages_per_s=20)) as running:
        heard: list[float] = []
        monkeypatch.setattr("fedloom_server.sites.Site.heard", lambda site: heard.append(time.monotonic()))

        async def messages() -> AsyncIterator[session_pb2.SiteMessage]:
            yield HELLO
            for _ in range(40):
                yield session_pb2.SiteMessage(heartbeat=session_pb2.Heartbeat())
            await asyncio.sleep(600)

        async with channel(running, WARD) as mine, asyncio.timeout(60):
            call = FederationServiceStub(mine).Attach(messages())
            await call.read()
            while len(heard) < 40:  # noqa: ASYNC110 (work of another task)
                await asyncio.sleep(0.01)
            call.cancel()
    # 41 messages, of which a second's worth of 20 passes at once, and the rest at 20 a second
    assert heard[-1] - heard[0] >= 0.9


async def test_many_sites_that_attach_at_once_stay_within_the_limits(bench) -> None:
    """Limits are each peer's own: how many peers there are does not matter."""
    calls = []
    for number in range(100):
        mine = channel(bench.running, Peer(Role.SITE, f"s{number}"))
        calls.append((mine, FederationServiceStub(mine).Attach(_hello_and_stay())))
    for mine, call in calls:
        assert (await asyncio.wait_for(call.read(), 60)).WhichOneof("kind") == "welcome"
        call.cancel()
        await mine.close()


async def _hello_and_stay() -> AsyncIterator[session_pb2.SiteMessage]:
    yield HELLO
    await asyncio.sleep(600)
