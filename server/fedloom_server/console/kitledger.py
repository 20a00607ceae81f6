"""What a kit remembers of its certificates: each that was issued, and those that no longer count."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from pydantic import TypeAdapter, ValidationError

from fedloom_common.authority import Authority
from fedloom_common.errors import BadSpec
from fedloom_common.files import write_text
from fedloom_common.identity import Role

CRL = "revoked.crl"
CRL_DAYS = 365
_LEDGER = "issued.jsonl"


@dataclass(frozen=True)
class Issued:
    """A certificate that the CA once made."""

    serial: str
    """In hexadecimal digits."""
    role: Role
    name: str
    expires: datetime


_ISSUED = TypeAdapter(Issued)


class Ledger:
    """The ca folder of a kit, beside the CA itself: issued.jsonl and the revocation list."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self._folder = folder
        self._authority = authority

    @property
    def crl(self) -> Path:
        """The revocation list."""
        return self._folder / CRL

    def issued(self, role: Role, name: str, certificate: bytes) -> None:
        """Note a certificate before it is handed out: only what is noted can be revoked by name."""
        made = x509.load_pem_x509_certificate(certificate)
        entry = Issued(f"{made.serial_number:x}", role, name, made.not_valid_after_utc)
        with (self._folder / _LEDGER).open("ab") as file:
            file.write(_ISSUED.dump_json(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, role: Role, name: str) -> set[int]:
        """Serials of every certificate of an identity."""
        return {
            int(entry.serial, 16) for entry in self._entries() if (entry.role, entry.name) == (role, name)
        }

    def knows(self, serial: int) -> bool:
        """Whether a serial was ever issued, as far as is noted."""
        return any(int(entry.serial, 16) == serial for entry in self._entries())

    def revoke(self, serials: Iterable[int] = (), *, days: int = CRL_DAYS) -> None:
        """Sign a new revocation list that names these too.

        Raises:
            BadSpec: the present list is damaged, or the days are wrong.
        """
        revoked, number = self._revoked()
        now = datetime.now(UTC)
        revoked |= {serial: now for serial in serials if serial not in revoked}
        signed = self._authority.list_revoked(revoked, number=number + 1, days=days)
        write_text(self.crl, signed.decode())

    def _revoked(self) -> tuple[dict[int, datetime], int]:
        if not self.crl.exists():
            return {}, 0
        try:
            listed = x509.load_pem_x509_crl(self.crl.read_bytes())
            number = listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        except (OSError, ValueError, x509.ExtensionNotFound) as error:
            # To begin anew would let everybody in again.
            raise BadSpec(
                f"{self.crl} is damaged ({error}); put back the copy that the coordinator has"
            ) from error
        return {entry.serial_number: entry.revocation_date_utc for entry in listed}, number

    def _entries(self) -> list[Issued]:
        path = self._folder / _LEDGER
        if not path.exists():
            return []
        try:
            return [_ISSUED.validate_json(line) for line in path.read_text().splitlines() if line]
        except (OSError, ValueError, ValidationError, json.JSONDecodeError) as error:
            raise BadSpec(f"{path} is damaged: {error}; put it back from a copy of the kit") from error
