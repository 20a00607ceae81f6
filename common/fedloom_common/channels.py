"""Channels to the coordinator, and the options that both ends of one must agree on."""

import functools
import logging
from typing import Any

import grpc

from fedloom_common.errors import BadSpec
from fedloom_common.identity import Peer, TlsFiles, insecure_metadata, is_loopback, require_loopback
from fedloom_common.rotation import LiveCredential

MESSAGE_BYTES = 8 << 20
RECEIVED_BYTES = 2 << 20
"""The largest message that the coordinator takes in, to say what is wrong with it."""
WINDOW_BYTES = 1 << 19
"""Unless configured, what a sender may have on its way beyond the chunk that is being read."""

_BOTH_ENDS: list[tuple[str, int]] = [
    # A minute is short enough for the NATs and firewalls that forget idle connections.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # The transport's own limit on pings; by default a stalled peer is noticed only after a minute and more.
    ("grpc.http2.ping_timeout_ms", 20_000),
    # By default pings stop after two without data between them, and an idle session would go unwatched.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # gRPC's own window grows to many MiB wherever queues are long, and all of it is lost when a line breaks.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
]

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *_BOTH_ENDS,
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    # The default grows to two minutes, which a site would wait after every restart of the coordinator.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_BOTH_ENDS,
    # Half of what clients use; the default of five minutes ends their connections with "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    # Connections that never finish a handshake cost nothing for longer than this.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A connection without a call costs a file; a site keeps a session, and who calls again connects again.
    ("grpc.max_connection_idle_ms", 60_000),
    # Tensors travel in chunks of 1 MiB; what has come of a message is in memory, and a peer may send many.
    ("grpc.max_receive_message_length", RECEIVED_BYTES),
    # Identity only: a compressed message could grow a thousandfold before its size is checked.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # With it, a second coordinator on the same port would start and silently take half of the connections.
    ("grpc.so_reuseport", 0),
]

logger = logging.getLogger(__name__)


def window(window_bytes: int) -> tuple[str, int]:
    """The option by which a receiver limits what senders may have on their way to it."""
    return ("grpc.http2.lookahead_bytes", window_bytes)


def most_connections(count: int) -> tuple[str, int]:
    """The option by which a server refuses further connections, before any handshake."""
    return ("grpc.max_allowed_incoming_connections", count)


def most_calls(count: int) -> tuple[str, int]:
    """The option by which a server has a client wait with further calls of one connection."""
    return ("grpc.max_concurrent_streams", count)


def open_channel(
    address: str,
    tls: TlsFiles | LiveCredential | None,
    insecure: Peer | None,
    *,
    window_bytes: int = WINDOW_BYTES,
    called: str | None = None,
) -> grpc.aio.Channel:
    """A channel to the coordinator at host:port, with a certificate or, on loopback only, a claimed identity.

    ``called`` is the name for which its certificate must be made, if not for the address's host.

    Raises:
        BadSpec: not exactly one of both is given, or a certificate's files are wrong.
        NotPermitted: no TLS, and the address is not a loopback address.
    """
    if tls is not None and insecure is not None:
        raise BadSpec("tls and insecure are both given; keep tls, and drop insecure")
    options: list[tuple[str, int | str]] = [*CHANNEL_OPTIONS, window(window_bytes)]
    if is_loopback(address):  # which a proxy from the environment would carry off this host
        options.append(("grpc.enable_http_proxy", 0))
    if called is not None:
        options.append(("grpc.ssl_target_name_override", called))
    if tls is not None:
        live = tls if isinstance(tls, LiveCredential) else LiveCredential(tls)
        return grpc.aio.secure_channel(address, live.for_channels(), options=options)
    if insecure is None:
        raise BadSpec("neither tls nor insecure is given; set tls to the files that `fedloom provision` made")
    require_loopback(address, "a channel without TLS")
    _warn_of_no_tls(address, insecure)
    # Peers of one process are as far apart as with certificates: each has a connection of its own.
    options.append(("grpc.use_local_subchannel_pool", 1))
    return grpc.aio.insecure_channel(address, options=options, interceptors=_interceptors(insecure))


@functools.cache  # a site opens a channel for each try to attach: once is loud enough
def _warn_of_no_tls(address: str, insecure: Peer) -> None:
    logger.warning(
        "NO TLS: everything is sent in clear and nobody's identity is proven; for tests on one machine only",
        extra={"coordinator": address, "identity": str(insecure)},
    )


class _Identified:
    """Adds the identity to a call's metadata; gRPC wants one interceptor for each kind of call."""

    def __init__(self, peer: Peer) -> None:
        self._metadata = insecure_metadata(peer)

    def _add_identity(self, details: Any) -> Any:
        return details._replace(metadata=grpc.aio.Metadata(*(details.metadata or ()), *self._metadata))


class _UnaryUnary(_Identified, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._add_identity(client_call_details), request)


class _UnaryStream(_Identified, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._add_identity(client_call_details), request)


class _StreamUnary(_Identified, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(self._add_identity(client_call_details), request_iterator)


class _StreamStream(_Identified, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(self._add_identity(client_call_details), request_iterator)


def _interceptors(peer: Peer) -> list[grpc.aio.ClientInterceptor]:
    return [kind(peer) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)]
