"""Certificate files on this host: whether they can be read, and belong together."""

from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from fedloom_common.errors import BadSpec


def read_credential(ca: Path, certificate: Path, key: Path) -> tuple[bytes, bytes, bytes]:
    """The three files' bytes, once it is sure that they fit: a failed handshake tells nobody why.

    Raises:
        BadSpec: a file is missing, unreadable, expired, or does not belong to the others.
    """
    pems = _read(ca, "CA"), _read(certificate, "certificate"), _read(key, "key")
    authorities, chain = _certificates(ca, pems[0]), _certificates(certificate, pems[1])
    if _spki(chain[0].public_key()) != _spki(_public_key(key, pems[2])):
        raise BadSpec(f"{key} is not the key of {certificate}; give the two that were made together")
    issuer = next((authority for authority in authorities if _issued_by(chain[-1], authority)), None)
    if issuer is None:
        raise BadSpec(
            f"{certificate} was not issued by the CA in {ca}; copy the whole folder of this host "
            "from the federation's kit again"
        )
    _check_dates(certificate, chain[0])
    _check_dates(ca, issuer)
    return pems


def certificate_expiry(path: Path) -> datetime:
    """When a certificate ends, in UTC.

    Raises:
        BadSpec: the file is missing or holds no certificate.
    """
    return _certificates(path, _read(path, "certificate"))[0].not_valid_after_utc


def expiry_of(pem: bytes) -> datetime:
    """When the first of some certificates ends, in UTC."""
    return x509.load_pem_x509_certificates(pem)[0].not_valid_after_utc


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now, begin, end = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise BadSpec(f"{path} expired at {end:%Y-%m-%d %H:%M} UTC; have a new one issued")
    if now < begin:
        raise BadSpec(f"{path} is valid only from {begin:%Y-%m-%d %H:%M} UTC; is this host's clock right?")


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSpec(
            f"the {what} file {path} cannot be read: {error.strerror}; check tls in the config"
        ) from error


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise BadSpec(f"{path} holds no certificate in PEM form: {error}") from error


def _public_key(path: Path, pem: bytes) -> PublicKeyTypes:
    try:
        return load_pem_private_key(pem, password=None).public_key()
    except TypeError as error:
        raise BadSpec(f"{path} is protected by a passphrase; a service needs a key without one") from error
    except ValueError as error:
        raise BadSpec(f"{path} holds no private key in PEM form: {error}") from error


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
