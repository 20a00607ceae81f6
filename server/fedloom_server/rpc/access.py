"""Who may call what: one table for every method, and who a caller is.

The table is checked for every call by ``guard``, before a byte of the request is decoded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from fedloom_common.chunks import CHUNK_BYTES
from fedloom_common.errors import NotPermitted
from fedloom_common.identity import Peer, PeerCertificate, Role, certificate_of, insecure_peer

OPERATORS = frozenset({Role.OPERATOR})
READERS = frozenset({Role.OPERATOR, Role.VIEWER})
SITES = frozenset({Role.SITE})
ALL = frozenset(Role)

SMALL_BYTES = 64 << 10
SESSION_MESSAGE_BYTES = 1 << 20  # a Hello that names thousands of files
SPEC_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What holds for one method."""

    roles: frozenset[Role]
    """Who may call it."""
    request_bytes: int = SMALL_BYTES
    """Largest message that a caller may send."""
    audited: str = ""
    """Action under which calls of operators and viewers stand in the audit log; empty for none."""
    subject: str = ""
    """Field of the request that names what the action is done to."""
    is_paced: bool = False
    """Whether a caller's messages are read no faster than ``limits.messages_per_s``."""


TABLE: Mapping[str, Rule] = {
    "/fedloom.v1.FederationService/Attach": Rule(
        roles=SITES, request_bytes=SESSION_MESSAGE_BYTES, is_paced=True
    ),
    "/fedloom.v1.TransferService/Read": Rule(roles=SITES | READERS, audited="file.read", subject="digest"),
    "/fedloom.v1.TransferService/Write": Rule(roles=SITES, request_bytes=CHUNK_BYTES + SMALL_BYTES),
    "/fedloom.v1.TransferService/QueryWrite": Rule(roles=SITES),
    "/fedloom.v1.RunService/Submit": Rule(roles=OPERATORS, request_bytes=SPEC_BYTES, audited="run.submit"),
    "/fedloom.v1.RunService/Clone": Rule(
        roles=OPERATORS, request_bytes=SPEC_BYTES, audited="run.clone", subject="run_id"
    ),
    "/fedloom.v1.RunService/Pause": Rule(roles=OPERATORS, audited="run.pause", subject="run_id"),
    "/fedloom.v1.RunService/Stop": Rule(roles=OPERATORS, audited="run.stop", subject="run_id"),
    "/fedloom.v1.RunService/Resume": Rule(roles=OPERATORS, audited="run.resume", subject="run_id"),
    "/fedloom.v1.RunService/List": Rule(roles=READERS),
    "/fedloom.v1.RunService/Get": Rule(roles=READERS),
    "/fedloom.v1.RunService/Watch": Rule(roles=READERS),
    "/fedloom.v1.RunService/Export": Rule(roles=READERS, audited="model.export", subject="run_id"),
    "/fedloom.v1.RunService/ListFailures": Rule(roles=READERS),
    "/fedloom.v1.RunService/ListSites": Rule(roles=READERS),
    "/fedloom.v1.MetricService/List": Rule(roles=READERS),
    "/fedloom.v1.AuditService/List": Rule(roles=READERS),
    "/fedloom.v1.SiteService/Get": Rule(roles=READERS),
    "/fedloom.v1.SiteService/Drain": Rule(roles=OPERATORS, audited="site.drain", subject="name"),
    "/fedloom.v1.SiteService/Undrain": Rule(roles=OPERATORS, audited="site.undrain", subject="name"),
    "/fedloom.v1.SiteService/Block": Rule(roles=OPERATORS, audited="site.block", subject="name"),
    "/fedloom.v1.SiteService/Unblock": Rule(roles=OPERATORS, audited="site.unblock", subject="name"),
    "/fedloom.v1.SiteService/Forget": Rule(roles=OPERATORS, audited="site.forget", subject="name"),
    "/fedloom.v1.SiteService/Label": Rule(roles=OPERATORS, audited="site.label", subject="name"),
    "/grpc.health.v1.Health/Check": Rule(roles=ALL),
    "/grpc.health.v1.Health/Watch": Rule(roles=ALL),
    "/grpc.health.v1.Health/List": Rule(roles=ALL),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(roles=ALL),
}

NOBODY = Rule(roles=frozenset())
"""What holds for a method that the table does not know."""

Context = grpc.aio.ServicerContext[Any, Any]


class Revocations(Protocol):
    """Whoever knows which certificates no longer count."""

    def require_valid(self, certificate: PeerCertificate) -> None:
        """Let a certificate pass.

        Raises:
            NotIdentified: it has been revoked.
        """


class Access:
    """Tells who calls."""

    def __init__(
        self,
        *,
        insecure: bool,
        refusal: Callable[[str], str | None] = lambda site: None,
        revocations: Revocations | None = None,
    ) -> None:
        """``refusal`` says why a site, by name, may not call at all; None if it may."""
        self._insecure = insecure
        self._refusal = refusal
        self._revocations = revocations

    def peer(self, context: Context) -> Peer:
        """The caller, by a certificate that counts now; where certificates are switched off, by what it says.

        Raises:
            NotIdentified: the certificate does not name exactly one peer, has expired or was revoked.
        """
        certificate = self.certificate(context)
        return certificate.peer if certificate else insecure_peer(context.invocation_metadata() or ())

    def certificate(self, context: Context) -> PeerCertificate | None:
        """The caller's certificate, if it counts now; None where certificates are switched off.

        Raises:
            NotIdentified: as ``peer`` says.
        """
        if self._insecure:
            return None
        certificate = certificate_of(context.auth_context())
        if self._revocations is not None:
            self._revocations.require_valid(certificate)
        return certificate

    def admit(self, method: str, context: Context) -> Peer:
        """The caller, if the table admits it to a method.

        Raises:
            NotPermitted: it does not, or the caller is nobody, or a site that is blocked.
        """
        peer = self.peer(context)
        roles = TABLE.get(method, NOBODY).roles
        if peer.role not in roles:
            wanted = " and ".join(f"{role}s" for role in Role if role in roles) or "nobody"
            raise NotPermitted(f"{peer} may not call {method}, which is for {wanted}")
        if peer.role is Role.SITE and (refusal := self._refusal(peer.name)) is not None:
            raise NotPermitted(refusal)
        return peer
