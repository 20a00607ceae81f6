"""Certificate files that change under a running process: the new ones are used, unless they are wrong."""

import logging
from collections.abc import Hashable
from datetime import UTC, datetime
from pathlib import Path

import grpc

from fedloom_common.certificates import expiry_of, read_credential
from fedloom_common.errors import BadSpec
from fedloom_common.identity import TlsFiles

WARNING_DAYS = (1, 7, 30)
DAY_S = 86_400.0

logger = logging.getLogger(__name__)


class ChangingFiles:
    """Tells once of each change of some files, when they have stopped changing."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._told = self._seen = self._stamp()

    def have_changed(self) -> bool:
        """Whether they differ from when this last said so; a copy that goes on is waited for."""
        before, self._seen = self._seen, self._stamp()
        if self._seen == self._told or self._seen != before:
            return False
        self._told = self._seen
        return True

    def _stamp(self) -> tuple[object, ...]:
        return tuple(_stamp(path) for path in self._paths)


class LiveCredential:
    """The three TLS files as they last were when they fitted together."""

    def __init__(self, tls: TlsFiles) -> None:
        """Read the files.

        Raises:
            BadSpec: one is missing, unreadable, expired, or does not belong to the others.
        """
        self._tls = tls
        self._files = ChangingFiles(tls.ca, tls.certificate, tls.key)
        self._pems = read_credential(tls.ca, tls.certificate, tls.key)
        self._wrong = ""
        """What was last wrong with changed files; they may come right without another change."""
        self.failures = 0
        """Times that changed files were wrong."""

    @property
    def ca(self) -> bytes:
        """The CA's certificates."""
        return self._pems[0]

    @property
    def expires(self) -> datetime:
        """When the certificate in use ends."""
        return expiry_of(self._pems[1])

    def look(self) -> bool:
        """Use files that have changed; False if they have not. To be called every few seconds.

        Raises:
            BadSpec: they are wrong, which is said once; what was in use stays in use.
        """
        if not (self._files.have_changed() or self._wrong):
            return False
        before, self._wrong = self._wrong, ""
        try:
            self._pems = read_credential(self._tls.ca, self._tls.certificate, self._tls.key)
        except BadSpec as error:
            self._wrong = str(error)
            if self._wrong == before:
                return False
            self.failures += 1
            raise
        return True

    def for_channels(self) -> grpc.ChannelCredentials:
        """Credentials of a channel that is opened now."""
        ca, certificate, key = self._pems
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def for_servers(self) -> grpc.ServerCredentials:
        """Credentials of a server whose every handshake shows, and trusts, what is in use then."""
        told = self._pems

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal told
            if self._pems is told:
                return None
            told = self._pems
            return _configuration(told)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(told),
            fetch,  # type: ignore[arg-type]  # None is how it says that nothing has changed
            require_client_authentication=True,
        )


class ExpiryWarnings:
    """Warns of each certificate's end when 30, 7 and 1 days are left, and after it."""

    def __init__(self) -> None:
        self._told: dict[Hashable, tuple[datetime, float]] = {}

    def look(self, what: str, expires: datetime, advice: str) -> None:
        """Warn of ``what`` if there is less time left than it was last warned of."""
        left_days = (expires - datetime.now(UTC)).total_seconds() / DAY_S
        reached = next((days for days in (0, *WARNING_DAYS) if left_days <= days), None)
        end, told_days = self._told.get(what, (expires, float("inf")))
        if reached is None or (end == expires and told_days <= reached):
            return
        self._told[what] = (expires, reached)
        level = logging.WARNING if reached > min(WARNING_DAYS) else logging.ERROR
        facts = {"what": what, "ends": f"{expires:%Y-%m-%d %H:%M} UTC", "advice": advice}
        message = "its validity ends soon" if left_days > 0 else "its validity has ended"
        logger.log(level, message, extra=facts | {"days_left": round(left_days, 1)})


def _configuration(pems: tuple[bytes, bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    ca, certificate, key = pems
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca)


def _stamp(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
