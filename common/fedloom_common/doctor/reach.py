"""The way to the coordinator, step by step: its name, a connection, TLS, gRPC; and its clock."""

import asyncio
import socket
import ssl
import time
from collections.abc import Generator, Iterator
from urllib.request import getproxies, proxy_bypass

import grpc
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedloom_common.channels import open_channel
from fedloom_common.doctor.credentials import hosts_of
from fedloom_common.doctor.findings import Finding, ok, problem, warning
from fedloom_common.errors import FederationError
from fedloom_common.identity import Peer, TlsFiles, is_loopback
from fedloom_common.rpc import TIME_KEY, error_of

CONNECT_S = 5.0
ANSWER_S = 10.0
SKEW_S = 5.0
LARGE_SKEW_S = 300.0

ITS_LOG = "ask who runs the coordinator to look at its log, which says why"

Place = tuple[socket.AddressFamily, str, int]
Steps = Generator[Finding, None, bool]
"""Findings, and whether it goes on from there."""


def way(
    address: str, tls: TlsFiles | None, insecure: Peer | None, called: str | None = None
) -> Iterator[Finding]:
    """Every step to the coordinator at host:port; what depends on a step that fails is left out.

    ``called`` is the name for which its certificate must be made, if not for the address's host.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    places: list[Place] = []
    if has_proxy := not is_loopback(address) and _has_proxy(host):
        yield warning(
            "proxy: the environment names one, through which gRPC will go",
            f"see that it allows CONNECT to {address}, or put {host} into no_proxy",
        )
    elif not (yield from _name(host, int(port), places)) or not (yield from _connection(places)):
        return
    if has_proxy or tls is None or (yield from _handshake(places[0], called or host, tls)):
        yield from asyncio.run(_health(address, tls, insecure, called))


def _name(host: str, port: int, places: list[Place]) -> Steps:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        yield problem(
            f"name: {host} cannot be resolved: {error.strerror or error}",
            "see coordinator in the config, and this host's DNS or /etc/hosts",
        )
        return False
    places += dict.fromkeys((family, str(place[0]), int(place[1])) for family, _, _, _, place in found)
    yield ok(f"name: {host} is {', '.join(place[1] for place in places)}")
    return True


def _connection(places: list[Place]) -> Steps:
    """Tries every address; those that take no connection are dropped."""
    failed = []
    for place in list(places):
        try:
            _connect(place).close()
        except OSError as error:
            places.remove(place)
            failed.append(f"{place[1]} port {place[2]}: {error.strerror or error}")
    if not places:
        yield problem(
            f"connection: none ({'; '.join(failed)})",
            "see that the coordinator runs, and that firewalls let this host dial out to it",
        )
        return False
    if failed:
        yield warning(
            f"connection: some addresses take none ({'; '.join(failed)})",
            "attaching may be slow: mend them, or take them out of DNS",
        )
    yield ok(f"connection: {places[0][1]} port {places[0][2]} takes them")
    return True


def _has_proxy(host: str) -> bool:
    proxy = getproxies().get("https") or getproxies().get("http")
    return bool(proxy) and not proxy_bypass(host)


def _handshake(place: Place, host: str, tls: TlsFiles) -> Steps:
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        with _connect(place) as raw, context.wrap_socket(raw, server_hostname=host) as secure:
            protocol, first = secure.selected_alpn_protocol(), secure.recv(1)
    except ssl.SSLCertVerificationError as error:
        yield problem(f"TLS: the coordinator's certificate is not good: {error.verify_message}",
                      _advice(error, place, host))  # fmt: skip
        return False
    except TimeoutError:
        yield problem("TLS: no answer", "see that the port is the coordinator's, not another service's")
        return False
    except OSError as error:
        yield problem(
            f"TLS: broken off: {getattr(error, 'reason', None) or error.strerror or error}",
            f"is this the coordinator's port? Then {ITS_LOG}",
        )
        return False
    if not first:
        yield problem("TLS: the coordinator does not take this host's certificate", ITS_LOG)
        return False
    if protocol != "h2":
        yield problem("TLS: what answers does not speak gRPC", "see coordinator in the config")
        return False
    yield ok("TLS: both ends take each other's certificate")
    return True


def _advice(error: ssl.SSLCertVerificationError, place: Place, host: str) -> str:
    if error.verify_code not in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
        return "see that tls.ca is of the coordinator's federation, and that both hosts' clocks are right"
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only to read whose it is
    context.set_alpn_protocols(["h2"])
    with _connect(place) as raw, context.wrap_socket(raw, server_hostname=host) as secure:
        shown = secure.getpeercert(binary_form=True) or b""
    hosts = ", ".join(hosts_of(x509.load_der_x509_certificate(shown))) or "no host"
    return f"it is made for {hosts}: call one of these, or have it made anew for {host}"


async def _health(
    address: str, tls: TlsFiles | None, insecure: Peer | None, called: str | None
) -> list[Finding]:
    """What the standard health service says, and what the coordinator's clock shows."""
    try:
        async with open_channel(address, tls, insecure, called=called) as channel:
            call = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=ANSWER_S
            )
            asked_s = time.time()
            answer = await call
            answered_s = time.time()
            told = dict(await call.trailing_metadata() or ())
    except grpc.RpcError as error:
        return [problem(f"gRPC: {error_of(error, 'the coordinator')}", ITS_LOG)]
    except FederationError as error:
        return [problem(f"gRPC: {error}", "see tls in the config")]
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        return [problem("gRPC: the coordinator does not serve", "it starts or drains: try again in a minute")]
    serving = ok("gRPC: the coordinator serves")
    if TIME_KEY not in told:
        return [serving]
    return [serving, _skew(float(told[TIME_KEY]), asked_s, answered_s)]


def _skew(theirs_s: float, asked_s: float, answered_s: float) -> Finding:
    """The difference of the clocks is known to within half of what the answer took."""
    skew_s = theirs_s - (asked_s + answered_s) / 2
    side = "behind" if skew_s > 0 else "ahead of"
    told = f"clock: this host's is {abs(skew_s):.1f} s {side} the coordinator's"
    advice = "have both hosts' clocks set by NTP: certificates are checked against them"
    sure_s = abs(skew_s) - (answered_s - asked_s) / 2
    if sure_s > LARGE_SKEW_S:
        return problem(told, advice)
    return warning(told, advice) if sure_s > SKEW_S else ok(told)


def _connect(place: Place) -> socket.socket:
    family, host, port = place
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_S)
        connection.connect((host, port))
    except OSError:
        connection.close()
        raise
    return connection
