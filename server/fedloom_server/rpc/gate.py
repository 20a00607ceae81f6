"""All that stands between the network and the handlers, put together and kept up to date."""

import asyncio
import logging
from collections.abc import Callable

import grpc

from fedloom_server.audit import AuditLog
from fedloom_server.config import CoordinatorConfig
from fedloom_server.rpc.access import Access
from fedloom_server.rpc.calls import Calls
from fedloom_server.rpc.caps import Caps
from fedloom_server.rpc.endings import Endings
from fedloom_server.rpc.guard import Guard
from fedloom_server.trust import Trust

LOOK_S = 1.0  # a file that has changed is used after two looks
SWEEP_S = 10.0  # a certificate that expires takes its calls with it so soon

logger = logging.getLogger(__name__)


class Gate:
    """Who may come in, by which certificates, and who has to leave."""

    def __init__(
        self, config: CoordinatorConfig, calls: Calls, log: AuditLog, refusal: Callable[[str], str | None]
    ) -> None:
        """``refusal`` says why a site, by name, may not call at all.

        Raises:
            BadSpec: a certificate's file or the revocation list is missing or wrong.
        """
        self._log = log
        self.trust = Trust(config.tls, log) if config.tls is not None else None
        self.access = Access(insecure=config.insecure, refusal=refusal, revocations=self.trust)
        self.endings = Endings(self.access)
        self.guard = Guard(self.access, Caps(config.limits), calls, self.endings, log)

    def credentials(self) -> grpc.ServerCredentials | None:
        """What a port needs; None where certificates are switched off."""
        return None if self.trust is None else self.trust.server_credentials()

    async def keep(self) -> None:
        """Look after files, calls and the audit log's counts, until cancelled."""
        clock = asyncio.get_running_loop().time
        swept_s = clock()
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                has_changed = self.trust is not None and self.trust.look()
                if has_changed or clock() - swept_s >= SWEEP_S:
                    swept_s = clock()
                    if ended := self.endings.sweep():
                        logger.warning("calls ended with their certificates", extra={"calls": ended})
                self._log.settle()
            except Exception:  # whatever it is, a later revocation must not go unread
                logger.exception("the look at certificates failed; it goes on")
