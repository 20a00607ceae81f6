"""Who the peer is: certificates at both ends of a channel, and the one identity that a certificate gives.

An identity is the certificate's only URI, ``spiffe://<federation>/<role>/<name>``. Nothing else in a
certificate, and nothing in a message, says who somebody is.
"""

import functools
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import TypeAdapter, ValidationError

from fedloom_common.errors import NotIdentified, NotPermitted
from fedloom_common.settings import ConfigPath
from fedloom_common.strict import NAME, Name, Strict

_NAME = TypeAdapter(Name)
_ROLE_KEY, _NAME_KEY = "fedloom-role", "fedloom-name"
_IDENTITY = re.compile(r"spiffe://[^/?#]+/(?P<role>[^/?#]+)/(?P<name>[^/?#]+)")
_LOOPBACK = re.compile(r"(?:\[(?P<six>[^\]]+)\]|(?P<four>[^:\[\]]+)):\d+")


class TlsFiles(Strict):
    """A certificate, its key, and the CA that the other end's certificate must come from."""

    ca: ConfigPath
    """Certificate of the federation's CA (PEM)."""
    certificate: ConfigPath
    """This host's certificate, followed by any intermediate ones (PEM)."""
    key: ConfigPath
    """Private key of the certificate (PEM, no passphrase)."""


class Role(StrEnum):
    """What a certificate allows its holder to be."""

    SITE = "site"
    OPERATOR = "operator"
    VIEWER = "viewer"
    COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Peer:
    """The identity of whoever is at the other end."""

    role: Role
    name: str

    def __str__(self) -> str:
        return f"{self.role} {self.name}"


@dataclass(frozen=True)
class PeerCertificate:
    """The certificate of whoever is at the other end, as far as it matters to us."""

    peer: Peer
    uri: str
    serial: int
    expires: datetime


def certificate_of(auth_context: Mapping[str, Iterable[bytes]]) -> PeerCertificate:
    """The client's certificate, from the context that gRPC keeps of the TLS handshake.

    Cheap enough for every call, which is what ends a long-lived connection whose certificate expires.

    Raises:
        NotIdentified: no certificate, one for another use, an expired one, or not exactly one identity.
    """
    certificates = list(auth_context.get("x509_pem_cert", ()))
    identities = list(auth_context.get("peer_spiffe_id", ()))
    if len(certificates) != 1:
        raise NotIdentified("a client certificate is required; get one from whoever runs `fedloom provision`")
    certificate = _certificate_of(certificates[0], tuple(identities))
    if datetime.now(UTC) > certificate.expires:
        raise NotIdentified(
            f"the certificate of {certificate.uri} expired at {certificate.expires:%Y-%m-%d %H:%M} UTC"
        )
    return certificate


@functools.lru_cache(maxsize=4096)  # every heartbeat of every site asks
def _certificate_of(pem: bytes, identities: tuple[bytes, ...]) -> PeerCertificate:
    facts = _facts_of(pem)
    # gRPC gives no identity for a certificate with several URIs: read the certificate, and let both agree.
    if len(facts.uris) != 1 or identities != (facts.uris[0].encode(),):
        raise NotIdentified(
            f"the certificate names {len(facts.uris)} identities ({', '.join(facts.uris) or 'no URI'}); "
            "exactly one spiffe://<federation>/<role>/<name> is wanted"
        )
    # A certificate without this extension passes gRPC's own check for any use.
    if not facts.for_clients:
        raise NotIdentified(f"the certificate of {facts.uris[0]} is not made for clients (clientAuth)")
    return PeerCertificate(_parse_identity(facts.uris[0]), facts.uris[0], facts.serial, facts.expires)


def peer_of(auth_context: Mapping[str, Iterable[bytes]]) -> Peer:
    """The client's identity.

    Raises:
        NotIdentified: as ``certificate_of`` says.
    """
    return certificate_of(auth_context).peer


def insecure_metadata(peer: Peer) -> tuple[tuple[str, str], ...]:
    """The identity as call metadata, for channels without TLS on loopback."""
    return ((_ROLE_KEY, peer.role.value), (_NAME_KEY, peer.name))


def insecure_peer(metadata: Iterable[tuple[str, str | bytes]]) -> Peer:
    """The identity that a client without TLS claims; only a server on a loopback address may believe it.

    Raises:
        NotIdentified: the metadata does not name exactly one role and name.
    """
    pairs = [(key, value) for key, value in metadata if key in (_ROLE_KEY, _NAME_KEY)]
    claimed = {
        key: value.decode("ascii", "replace") if isinstance(value, bytes) else value for key, value in pairs
    }
    if len(pairs) != 2 or len(claimed) != 2:
        raise NotIdentified(f"without TLS a call names itself by {_ROLE_KEY} and {_NAME_KEY}, once each")
    return _peer(claimed[_ROLE_KEY], claimed[_NAME_KEY], f"{_ROLE_KEY} and {_NAME_KEY}")


def require_loopback(address: str, what: str) -> None:
    """Allow only addresses that never leave this host: localhost, 127.0.0.0/8, [::1] or unix:PATH.

    Raises:
        NotPermitted: the address is, or may resolve to, one that other hosts reach.
    """
    if address.startswith("unix:") or is_loopback(address):
        return
    raise NotPermitted(
        f"{what} has no encryption and no proof of identity, so it is for loopback addresses only "
        f"(127.0.0.1, [::1], localhost), not {address}; give tls for any other"
    )


def is_loopback(address: str) -> bool:
    """Whether a host:port never leaves this host."""
    match = _LOOPBACK.fullmatch(address)
    return match is not None and _is_loopback(match["six"] or match["four"])


@dataclass(frozen=True)
class _Facts:
    uris: tuple[str, ...]
    for_clients: bool
    expires: datetime
    serial: int


def _facts_of(pem: bytes) -> _Facts:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        extensions = certificate.extensions
    except ValueError as error:
        raise NotIdentified(f"the client certificate cannot be read: {error}") from error
    uris: list[str] = []
    for_clients = False
    for extension in extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
        if isinstance(extension.value, x509.ExtendedKeyUsage):
            for_clients = ExtendedKeyUsageOID.CLIENT_AUTH in extension.value
    return _Facts(tuple(uris), for_clients, certificate.not_valid_after_utc, certificate.serial_number)


def _parse_identity(uri: str) -> Peer:
    match = _IDENTITY.fullmatch(uri)
    if match is None:
        raise NotIdentified(f"the certificate names {uri}, which is not spiffe://<federation>/<role>/<name>")
    return _peer(match["role"], match["name"], uri)


def _peer(role: str, name: str, source: str) -> Peer:
    if role not in list(Role):
        raise NotIdentified(f"{source} gives the role {role!r}; known are {', '.join(Role)}")
    try:
        return Peer(Role(role), _NAME.validate_python(name))
    except ValidationError as error:
        raise NotIdentified(f"{source} gives the name {name!r}; a name is {NAME}") from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
