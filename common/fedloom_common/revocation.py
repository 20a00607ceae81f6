"""Revocation lists: the certificates of a federation that no longer count, signed by its CA (RFC 5280)."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedloom_common.errors import BadSpec

RENEW = "make a new one with `fedloom provision crl`, and copy it here"


@dataclass(frozen=True, kw_only=True)
class RevocationList:
    """A list that was found to be in order."""

    revoked: Mapping[int, datetime]
    """When each certificate was revoked, by its serial number."""
    number: int
    """Grows with each list."""
    expires: datetime


def read_revocations(path: Path, authorities: bytes) -> RevocationList:
    """Read a revocation list in PEM form, signed by one of the CAs whose certificates are given.

    Raises:
        BadSpec: it is missing, no such list, signed by somebody else, or has expired.
    """
    try:
        listed = x509.load_pem_x509_crl(path.read_bytes())
    except OSError as error:
        raise BadSpec(f"the revocation list {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadSpec(f"{path} holds no revocation list in PEM form: {error}") from error
    if not any(_is_signed_by(listed, ca) for ca in x509.load_pem_x509_certificates(authorities)):
        raise BadSpec(f"the revocation list {path} is not signed by this federation's CA; {RENEW}")
    expires = listed.next_update_utc
    if expires is None or datetime.now(UTC) > expires:
        raise BadSpec(f"the revocation list {path} expired at {expires or 'no time that it tells'}; {RENEW}")
    revoked = {entry.serial_number: entry.revocation_date_utc for entry in listed}
    return RevocationList(revoked=revoked, number=_number_of(listed), expires=expires)


def _is_signed_by(listed: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    if listed.issuer != ca.subject:
        return False
    try:
        # An Ed25519 or RSA CA that somebody else made signs as well as ours.
        return listed.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _number_of(listed: x509.CertificateRevocationList) -> int:
    try:
        return listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return 0
