"""The federation's certificate authority: it makes the certificates that give everybody a name."""

import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import TypeAdapter, ValidationError

from fedloom_common.errors import BadSpec
from fedloom_common.files import atomic_file
from fedloom_common.identity import Role
from fedloom_common.strict import NAME, Name

CA_DAYS = 3652
LEAF_DAYS = 365
FEDERATION_CHARACTERS = 60  # with " CA" it must fit the 64 characters of a common name
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

_CLOCK_SKEW = timedelta(minutes=10)  # hosts whose clocks run behind must accept a certificate made just now
_NAME = TypeAdapter(Name)
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"({_LABEL}\.)*(?!\d+$){_LABEL}")  # a mistyped IP address is no host name


@dataclass(frozen=True)
class Credential:
    """A new certificate and its private key, in PEM form."""

    certificate: bytes
    key: bytes

    def save(self, certificate: Path, key: Path) -> None:
        """Write both, the key readable by its owner only.

        Raises:
            BadSpec: the key's file exists; a key is never overwritten.
        """
        try:
            descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise BadSpec(f"{key} exists, and a key is never overwritten; move it away first") from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.key)
            file.flush()
            os.fsync(file.fileno())
        with atomic_file(certificate) as file:
            file.write(self.certificate)


class Authority:
    """A CA that signs the leaves of one federation, and whose own certificate allows nothing else.

    The path length of 0 forbids further CAs; the name constraint forbids identities of another federation.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, directory: Path, federation: str) -> Self:
        """Make a new CA and write ca.crt and ca.key into a directory.

        Raises:
            BadSpec: the federation's name is not like a host's, or the directory holds a CA.
        """
        if not _HOST.fullmatch(federation) or len(federation) > FEDERATION_CHARACTERS:
            raise BadSpec(
                f"{federation!r} cannot name a federation; wanted are up to {FEDERATION_CHARACTERS} small "
                "letters, digits, dashes and dots, like a host's name"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{federation} CA")])
        certificate = (
            _builder(
                name, name, key.public_key(), key.public_key(), datetime.now(UTC) + timedelta(days=CA_DAYS)
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(_identities([f"spiffe://{federation}"]), critical=False)
            .add_extension(
                x509.NameConstraints([x509.UniformResourceIdentifier(federation)], None), critical=True
            )
            .sign(key, hashes.SHA256())
        )
        directory.mkdir(parents=True, exist_ok=True)
        Credential(certificate.public_bytes(Encoding.PEM), _pem(key)).save(
            directory / "ca.crt", directory / "ca.key"
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the CA that ``create`` wrote.

        Raises:
            BadSpec: a file is missing or is not the CA's.
        """
        try:
            certificate = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
            key = load_pem_private_key((directory / "ca.key").read_bytes(), password=None)
        except OSError as error:
            raise BadSpec(
                f"{error.filename} cannot be read: {error.strerror}; put the kit's ca folder back"
            ) from error
        except (ValueError, TypeError) as error:
            raise BadSpec(f"{directory} holds no CA that fedloom made: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise BadSpec(f"{directory / 'ca.key'} is not the key of {directory / 'ca.crt'}")
        return cls(certificate, key)

    @property
    def certificate(self) -> bytes:
        """The CA's certificate in PEM form, which every host of the federation trusts."""
        return self._certificate.public_bytes(Encoding.PEM)

    @property
    def federation(self) -> str:
        """The federation's name."""
        names = self._certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(x509.UniformResourceIdentifier)[0].removeprefix("spiffe://")

    def issue(self, role: Role, name: str, *, hosts: Iterable[str] = (), days: int = LEAF_DAYS) -> Credential:
        """Make a certificate that names its holder; ``hosts`` are where clients reach a coordinator.

        A coordinator is always reachable as localhost too.

        Raises:
            BadSpec: a name, a host or the number of days is wrong.
        """
        _require_name(name, role)
        left = (self._certificate.not_valid_after_utc - datetime.now(UTC)).days
        if not 1 <= days <= left:
            raise BadSpec(f"a certificate must last from 1 to {left} days, where its CA ends, not {days}")
        expires = datetime.now(UTC) + timedelta(days=days)
        serves = role is Role.COORDINATOR
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        reachable = dict.fromkeys([*hosts, *LOCAL_HOSTS]) if serves else hosts
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        usages += [ExtendedKeyUsageOID.SERVER_AUTH] if serves else []
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(subject, self._certificate.subject, key.public_key(), self._key.public_key(), expires)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                _identities([f"spiffe://{self.federation}/{role}/{name}"], reachable), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return Credential(certificate.public_bytes(Encoding.PEM), _pem(key))

    def list_revoked(self, revoked: Mapping[int, datetime], *, number: int, days: int) -> bytes:
        """Sign a revocation list, in PEM form: since when each certificate, by its serial, no longer counts.

        Raises:
            BadSpec: the number of days is wrong.
        """
        now = datetime.now(UTC)
        left = (self._certificate.not_valid_after_utc - now).days
        if not 1 <= days <= left:
            raise BadSpec(f"a revocation list must last from 1 to {left} days, where its CA ends, not {days}")
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(now - _CLOCK_SKEW)
            .next_update(now + timedelta(days=days))
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )
        for serial, since in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(since).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    expires: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _CLOCK_SKEW)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _identities(uris: list[str], hosts: Iterable[str] = ()) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(
        [*(x509.UniformResourceIdentifier(uri) for uri in uris), *(_general_name(host) for host in hosts)]
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if _HOST.fullmatch(host) and len(host) <= 253:
            return x509.DNSName(host)
    raise BadSpec(
        f"{host!r} is no host; wanted is an IP address or a name such as fed.example.org, without a port"
    )


def _require_name(name: str, role: Role) -> None:
    try:
        _NAME.validate_python(name)
    except ValidationError as error:
        raise BadSpec(f"{name!r} is not allowed as {role} name; wanted are {NAME}") from error


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
