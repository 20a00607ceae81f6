import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from fedloom_common import rotation
from fedloom_common.authority import Authority
from fedloom_common.channels import MESSAGE_BYTES, RECEIVED_BYTES, SERVER_OPTIONS, open_channel
from fedloom_common.errors import BadSpec, NotPermitted
from fedloom_common.identity import Peer, Role, TlsFiles, insecure_peer, peer_of
from fedloom_common.rotation import LiveCredential

PEER = Peer(Role.SITE, "ward-a")


def caller(context: grpc.aio.ServicerContext) -> bytes:
    if context.auth_context().get("x509_pem_cert"):
        return str(peer_of(context.auth_context())).encode()
    return str(insecure_peer(context.invocation_metadata() or ())).encode()


async def one_one(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    return caller(context) + b" " + str(len(request)).encode()


async def one_many(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    for _ in range(2):
        yield caller(context)


async def many_one(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
    received = [request async for request in requests]
    return caller(context) + b" " + b"".join(received)


async def many_many(
    requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
) -> AsyncIterator[bytes]:
    async for request in requests:
        yield caller(context) + b" " + request


HANDLER = grpc.method_handlers_generic_handler(
    "test.Calls",
    {
        "OneOne": grpc.unary_unary_rpc_method_handler(one_one),
        "OneMany": grpc.unary_stream_rpc_method_handler(one_many),
        "ManyOne": grpc.stream_unary_rpc_method_handler(many_one),
        "ManyMany": grpc.stream_stream_rpc_method_handler(many_many),
    },
)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers([HANDLER])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(address, None, PEER) as channel:
        yield channel


@pytest.fixture
def behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)


async def requests() -> AsyncIterator[bytes]:
    yield b"a"
    yield b"b"


async def test_every_kind_of_call_carries_the_claimed_identity(channel: grpc.aio.Channel) -> None:
    assert await channel.unary_unary("/test.Calls/OneOne")(b"123", timeout=60) == b"site ward-a 3"
    many = channel.unary_stream("/test.Calls/OneMany")(b"", timeout=60)
    assert [answer async for answer in many] == [b"site ward-a"] * 2
    assert await channel.stream_unary("/test.Calls/ManyOne")(requests(), timeout=60) == b"site ward-a ab"
    both = channel.stream_stream("/test.Calls/ManyMany")(requests(), timeout=60)
    assert [answer async for answer in both] == [b"site ward-a a", b"site ward-a b"]


async def test_a_written_stream_carries_it_beside_the_calls_own_metadata(channel: grpc.aio.Channel) -> None:
    call = channel.stream_stream("/test.Calls/ManyMany")(timeout=60, metadata=(("own", "x"),))
    await call.write(b"a")
    assert await call.read() == b"site ward-a a"
    await call.write(b"b")
    assert await call.read() == b"site ward-a b"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


@pytest.fixture
def secure_files(tmp_path: Path) -> TlsFiles:
    """A site's certificate, its key and the CA."""
    Authority.create(tmp_path, "fed.test").issue(Role.SITE, "a").save(tmp_path / "a.crt", tmp_path / "a.key")
    return TlsFiles(ca=tmp_path / "ca.crt", certificate=tmp_path / "a.crt", key=tmp_path / "a.key")


@pytest.fixture
async def secure(tmp_path: Path) -> AsyncIterator[tuple[str, TlsFiles]]:
    """A server's address on this host, and an operator's certificate for it."""
    authority = Authority.create(tmp_path, "fed.test")

    def files(role: Role, name: str) -> TlsFiles:
        authority.issue(role, name).save(tmp_path / f"{role}.crt", tmp_path / f"{role}.key")
        return TlsFiles(
            ca=tmp_path / "ca.crt", certificate=tmp_path / f"{role}.crt", key=tmp_path / f"{role}.key"
        )

    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers([HANDLER])
    own = LiveCredential(files(Role.COORDINATOR, "coordinator"))
    port = server.add_secure_port("127.0.0.1:0", own.for_servers())
    await server.start()
    yield f"localhost:{port}", files(Role.OPERATOR, "ann")
    await server.stop(None)


async def test_a_secure_channel_has_the_certificates_identity(secure: tuple[str, TlsFiles]) -> None:
    async with open_channel(*secure, None) as channel:
        assert await channel.unary_unary("/test.Calls/OneOne")(b"", timeout=60) == b"operator ann 0"


@pytest.mark.usefixtures("behind_a_proxy")
async def test_a_proxy_never_sees_a_secure_channel_within_this_host(secure: tuple[str, TlsFiles]) -> None:
    async with open_channel(*secure, None) as channel:
        assert await channel.unary_unary("/test.Calls/OneOne")(b"", timeout=20) == b"operator ann 0"


async def test_a_channel_without_tls_is_for_loopback_and_says_so_loudly(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NotPermitted, match="loopback addresses only"):
        open_channel("10.0.0.1:7443", None, PEER)
    with caplog.at_level(logging.WARNING):
        await open_channel(address, None, PEER).close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "NO TLS" in caplog.text


@pytest.mark.usefixtures("behind_a_proxy")
async def test_a_proxy_never_sees_a_channel_without_tls(address: str) -> None:
    async with open_channel(address, None, PEER) as channel:
        assert await channel.unary_unary("/test.Calls/OneOne")(b"", timeout=60) == b"site ward-a 0"


async def test_exactly_one_way_to_be_known_is_needed(tmp_path: Path) -> None:
    tls = TlsFiles(ca=tmp_path / "a", certificate=tmp_path / "b", key=tmp_path / "c")
    with pytest.raises(BadSpec, match="both given"):
        open_channel("127.0.0.1:1", tls, PEER)
    with pytest.raises(BadSpec, match="neither tls nor insecure"):
        open_channel("127.0.0.1:1", None, None)
    with pytest.raises(BadSpec, match="CA file"):
        open_channel("127.0.0.1:1", tls, None)


async def test_messages_above_the_cap_are_refused_at_both_ends(
    address: str, channel: grpc.aio.Channel
) -> None:
    fits, too_large = b"x" * (RECEIVED_BYTES - 100), b"x" * (MESSAGE_BYTES + 1)
    call = channel.unary_unary("/test.Calls/OneOne")
    assert await call(fits, timeout=60) == b"site ward-a %d" % len(fits)
    for wrong in (b"x" * (RECEIVED_BYTES + 1), too_large):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(wrong, timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    uncapped = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=uncapped) as reckless:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reckless.unary_unary("/test.Calls/OneOne")(too_large, timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_compressed_message_is_refused(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test.Calls/OneOne")(
                b"0" * 100_000, timeout=60, compression=grpc.Compression.Gzip
            )
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_second_coordinator_cannot_take_the_port(address: str) -> None:
    second = grpc.aio.server(options=SERVER_OPTIONS)
    with pytest.raises(RuntimeError, match="Failed to bind"):
        second.add_insecure_port(address)


def test_files_that_come_right_without_changing_are_used(
    secure_files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that the daemon may not read, until somebody changes its owner."""
    live = LiveCredential(secure_files)
    read, refusals = rotation.read_credential, ["denied", "denied", "worse"]

    def reading(*paths: Path) -> tuple[bytes, bytes, bytes]:
        if refusals:
            raise BadSpec(refusals.pop(0))
        return read(*paths)

    monkeypatch.setattr(rotation, "read_credential", reading)
    secure_files.key.touch()
    answers = []
    for _ in range(6):
        try:
            answers.append(str(live.look()))
        except BadSpec as error:
            answers.append(str(error))
    assert answers == ["False", "denied", "False", "worse", "True", "False"]
    assert live.failures == 2
