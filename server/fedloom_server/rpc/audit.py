"""The gRPC edge of the audit log."""

from fedloom.v1 import audit_pb2 as pb
from fedloom.v1.audit_pb2_grpc import AuditServiceServicer
from fedloom_server.audit import PAGE_ENTRIES, AuditLog
from fedloom_server.auditchain import Entry
from fedloom_server.rpc.access import Context


class AuditEdge(AuditServiceServicer):
    """List."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    async def List(self, request: pb.ListAuditRequest, context: Context) -> pb.ListAuditResponse:  # noqa: N802
        """Entries, oldest first, and the head."""
        most = min(request.most, PAGE_ENTRIES)
        entries = self._log.entries(request.after, most) if most else []
        head = self._log.head()
        messages = [_message(entry) for entry in entries]
        return pb.ListAuditResponse(entries=messages, head_seq=head.seq, head_hash=head.hash)


def _message(entry: Entry) -> pb.AuditEntry:
    return pb.AuditEntry(
        seq=entry.seq, at=entry.at, actor=entry.actor, action=entry.action, subject=entry.subject,
        details=entry.details, previous=entry.previous, hash=entry.hash,
    )  # fmt: skip
