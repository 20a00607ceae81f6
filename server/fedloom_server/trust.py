"""Whom the coordinator believes, kept up to date while it runs: its own certificate, and revoked ones."""

import logging
from collections.abc import Callable
from typing import Any

import grpc

from fedloom_common.errors import BadSpec, NotIdentified
from fedloom_common.identity import PeerCertificate
from fedloom_common.revocation import RevocationList, read_revocations
from fedloom_common.rotation import ChangingFiles, ExpiryWarnings, LiveCredential
from fedloom_server.audit import COORDINATOR, AuditLog
from fedloom_server.config import CoordinatorTls

RENEW = "fedloom provision renew {}"

logger = logging.getLogger(__name__)


class Trust:
    """The coordinator's TLS files, read again when they change; if they are wrong, what was in use stays."""

    def __init__(self, tls: CoordinatorTls, log: AuditLog) -> None:
        """Read the files.

        Raises:
            BadSpec: one is missing or wrong; at the start there is nothing to go on with.
        """
        self._path = tls.crl
        self._log = log
        self.credential = LiveCredential(tls)
        self.revocations: RevocationList | None = None
        self.failures = 0
        """Times that a changed file was refused."""
        self._files = ChangingFiles(*([tls.crl] if tls.crl else []))
        self._warnings = ExpiryWarnings()
        if self._path is not None:
            self._load_revocations()

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials that demand a certificate of the federation's CA from every client."""
        return self.credential.for_servers()

    def require_valid(self, certificate: PeerCertificate) -> None:
        """Let a certificate pass that has not been revoked.

        Raises:
            NotIdentified: it has.
        """
        if self.revocations is not None and certificate.serial in self.revocations.revoked:
            raise NotIdentified(
                f"the certificate {certificate.serial:x} of {certificate.peer} has been revoked"
            )

    def noticed(self, certificate: PeerCertificate) -> None:
        """Warn of a site's certificate that ends soon."""
        advice = RENEW.format(f"{certificate.peer}")
        self._warnings.look(str(certificate.peer), certificate.expires, advice)

    def look(self) -> bool:
        """Take up files that have changed, and warn of ends; whether anything is in use that was not."""
        has_changed = [self._look_at("certificate", self._new_credential)]
        has_changed.append(self._look_at("crl", self._new_revocations))
        self._warnings.look("coordinator", self.credential.expires, RENEW.format("coordinator"))
        if self.revocations is not None:
            self._warnings.look("revocation list", self.revocations.expires, "fedloom provision crl")
        return any(has_changed)

    def _look_at(self, what: str, take_up: Callable[[], bool]) -> bool:
        try:
            return take_up()
        except BadSpec as error:
            self.failures += 1
            logger.error("a changed file is wrong; what was in use stays", extra={"reason": str(error)})
            self._log.audit_often(COORDINATOR, f"{what}.refused", reason=str(error))
        return False

    def _new_credential(self) -> bool:
        if not self.credential.look():
            return False
        self._tell("certificate.loaded", expires=f"{self.credential.expires:%Y-%m-%d %H:%M}")
        return True

    def _new_revocations(self) -> bool:
        if not self._files.have_changed():
            return False
        self._load_revocations()
        return True

    def _load_revocations(self) -> None:
        assert self._path is not None, "only a list that is named is loaded"
        before, loaded = self.revocations, read_revocations(self._path, self.credential.ca)
        if before is not None and loaded.number < before.number:
            raise BadSpec(
                f"the revocation list {self._path} has number {loaded.number}, older than {before.number}, "
                "which is in use; copy the newest one here"
            )
        self.revocations = loaded
        self._tell("crl.loaded", number=loaded.number, revoked=len(loaded.revoked))

    def _tell(self, action: str, **facts: Any) -> None:
        logger.info("trust changed", extra={"action": action, **facts})
        self._log.audit_often(COORDINATOR, action, **facts)
