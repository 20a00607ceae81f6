"""A host's certificate, its key and the CA, as files on this host."""

from collections.abc import Iterator
from datetime import UTC, datetime

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
        yield problem(str(error), "copy this host's folder from the federation's kit again")
        yield from _expiry(tls)
        return
    yield ok(f"{tls.certificate.name}, its key and the CA belong together")
    yield from _expiry(tls)
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


def _expiry(tls: TlsFiles) -> Iterator[Finding]:
    for path in (tls.certificate, tls.ca):
        try:
            end = x509.load_pem_x509_certificates(path.read_bytes())[0].not_valid_after_utc
        except (OSError, ValueError):
            continue  # read_credential has said so
        days = (end - datetime.now(UTC)).days
        told = f"{path.name} ends at {end:%Y-%m-%d}, in {days} days"
        renew = "have a new one issued, with `fedloom provision`"
        if days < 0:
            yield problem(f"{path.name} ended at {end:%Y-%m-%d}", renew)
        else:
            yield warning(told, renew) if days < SOON_DAYS else ok(told)


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
