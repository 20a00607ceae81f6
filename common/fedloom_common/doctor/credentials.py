"""A host's certificate, its key and the CA, as files on this host."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedloom_common.certificates import read_credential
from fedloom_common.doctor.findings import Finding, ok, problem, warning
from fedloom_common.errors import BadSpec, NotPermitted
from fedloom_common.identity import Role, TlsFiles, peer_of

SOON_DAYS = 30


def credential(tls: TlsFiles | None, role: Role) -> Iterator[Finding]:
    """Whether the three files can be read, belong together, are current, and name somebody of this role."""
    if tls is None:
        yield warning(
            "there is no certificate: nothing is encrypted and nobody's identity is proven",
            "for tests on one machine only; else set tls to the files that `fedloom provision` made",
        )
        return
    try:
        _, pem, _ = read_credential(tls.ca, tls.certificate, tls.key)
    except BadSpec as error:
        yield problem(str(error), _way_out(tls, role))
        return
    yield ok(f"{tls.certificate.name}, its key and the CA belong together")
    yield from _expiry(tls, role)
    yield from _identity(x509.load_pem_x509_certificates(pem)[0], role)
    yield from _key_mode(tls)


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Names and addresses at which a server with this certificate may be called."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]


def _way_out(tls: TlsFiles, role: Role) -> str:
    """What to do about files that cannot be used: those of the kit may be no better, or the clock wrong."""
    now = datetime.now(UTC)
    for path, certificate in _readable(tls):
        if now < certificate.not_valid_before_utc:
            return f"set this host's clock, if it is not {now:%Y-%m-%d %H:%M} UTC; else wait until then"
        if now > certificate.not_valid_after_utc:
            return _renewal(path, tls, role)
    return "copy this host's folder from the federation's kit again"


def _expiry(tls: TlsFiles, role: Role) -> Iterator[Finding]:
    for path, certificate in _readable(tls):
        end = certificate.not_valid_after_utc
        days = (end - datetime.now(UTC)).days
        told = f"{path.name} ends at {end:%Y-%m-%d}, in {days} days"
        yield warning(told, _renewal(path, tls, role)) if days < SOON_DAYS else ok(told)


def _readable(tls: TlsFiles) -> Iterator[tuple[Path, x509.Certificate]]:
    for path in (tls.certificate, tls.ca):
        with suppress(OSError, ValueError):  # read_credential says so
            yield path, x509.load_pem_x509_certificates(path.read_bytes())[0]


def _renewal(path: Path, tls: TlsFiles, role: Role) -> str:
    if path == tls.ca:
        return "make a new kit for the whole federation, with `fedloom provision init`"
    whose = role.value if role is Role.COORDINATOR else f"{role} NAME"
    return f"have a new one made by `fedloom provision renew {whose}`, and copy it and its key here"


def _identity(certificate: x509.Certificate, role: Role) -> Iterator[Finding]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    pem = certificate.public_bytes(Encoding.PEM)
    advice = f"use the certificate that was made for this {role}"
    try:
        peer = peer_of({"x509_pem_cert": [pem], "peer_spiffe_id": [uri.encode() for uri in uris]})
    except NotPermitted as error:
        yield problem(str(error), advice)
        return
    yield ok(f"it names {peer}") if peer.role is role else problem(f"it names {peer}, not a {role}", advice)
    if role is Role.COORDINATOR:
        hosts = hosts_of(certificate)
        if hosts:
            yield ok(f"it is good for calls to {', '.join(hosts)}")
        else:
            yield problem("it names no host", "have it made anew: `fedloom provision init --host NAME`")


def _key_mode(tls: TlsFiles) -> Iterator[Finding]:
    mode = tls.key.stat().st_mode & 0o777
    if mode & 0o007:
        yield warning(f"everybody on this host may read {tls.key} (mode {mode:o})", f"chmod 600 {tls.key}")
    else:
        yield ok(f"{tls.key.name} is not for everybody (mode {mode:o})")
