"""The gRPC edge of sites' sessions: messages to calls, and calls to messages."""

import asyncio
import logging
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import grpc

from fedloom.v1 import session_pb2 as pb
from fedloom.v1.session_pb2_grpc import FederationServiceServicer
from fedloom_common.bursts import Bursts, untold_fact
from fedloom_common.errors import FederationError, Unreachable
from fedloom_common.identity import Peer
from fedloom_server.audit import AuditLog
from fedloom_server.evaluation import SiteMetrics
from fedloom_server.records import Work, site_of
from fedloom_server.reports import Reports
from fedloom_server.results import Result
from fedloom_server.roster import Site
from fedloom_server.rpc.caps import LINES_AT_ONCE, LINES_PER_S
from fedloom_server.rpc.endings import current_call
from fedloom_server.rpc.gate import Gate
from fedloom_server.rpc.hellos import description_of, labels_of, read_hello, short
from fedloom_server.rpc.links import Silence, SiteLink
from fedloom_server.rpc.messages import phase_name
from fedloom_server.sites import Sites
from fedloom_server.watching import SiteProgress

MISSED_HEARTBEATS = 3
HEARTBEATS_PER_S = 20  # of all sites together, as far as LONGEST_HEARTBEAT_S allows
LONGEST_HEARTBEAT_S = 60.0
# What a site may say at most: it is kept, and shown to operators.
TEXT_CHARACTERS = 16_000
NUMBERS = 64
ASSIGNMENT_CHARACTERS = 300  # of an assignment's id, most of which are its site's name
OPEN_ASSIGNMENTS = 100  # each is looked up in the database before anybody else is served
KEPT_RUNS = 1000

_PLAIN = re.compile(r"[^A-Za-z0-9_.-]")
"""What a metric's name may not have: it stands in logs and tables."""

Kept = TypeVar("Kept")
Context = grpc.aio.ServicerContext[pb.SiteMessage, pb.CoordinatorMessage]

logger = logging.getLogger(__name__)


class FederationEdge(FederationServiceServicer):
    """Attach: one session of one site."""

    def __init__(
        self,
        gate: Gate,
        sites: Sites,
        reports: Reports,
        log: AuditLog,
        *,
        heartbeat_s: float,
        model_name: str,
    ) -> None:
        self._gate = gate
        self._access = gate.access
        self._sites = sites
        self._reports = reports
        self._heartbeat_s = heartbeat_s
        self._model_name = model_name
        self._log = log
        self._foreign = Bursts(LINES_PER_S, LINES_AT_ONCE)
        self._handlers: Mapping[str, Callable[[str, Any], None]] = {
            "progress": self._progress,
            "outcome": self._outcome,
            "refusal": lambda site, told: reports.refused(site, told.assignment_id, _text(told.reason)),
            "failure": lambda site, told: reports.failed(site, told.assignment_id, _text(told.reason)),
            "heartbeat": lambda site, told: None,
        }

    async def Attach(  # noqa: N802 (the contract's name)
        self, request_iterator: AsyncIterator[pb.SiteMessage], context: Context
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        """Serve a session until either side ends it or the site is silent."""
        peer = self._access.peer(context)
        site = peer.name
        hello = await read_hello(request_iterator)
        link = SiteLink(self._model_name, partial(self._gate.endings.end, current_call()))
        try:
            with (
                self._sites.attached(site, description_of(hello), link, labels_of(hello)) as entry,
                self._audited(entry, context),
            ):
                heartbeat_s = self._pace_s()
                link.welcome(site, heartbeat_s)
                self._reports.attached(
                    site, hello.open_assignments[:OPEN_ASSIGNMENTS], hello.kept_runs[:KEPT_RUNS]
                )
                silence = Silence(MISSED_HEARTBEATS * heartbeat_s, link.give_up, site)
                reading = asyncio.create_task(self._read(entry, request_iterator, link, silence, context))
                try:
                    async for message in link.messages():
                        yield message
                finally:
                    reading.cancel()
                    silence.end()
        finally:
            if self._sites.link(site) is None:  # no newer session has taken its place
                self._reports.detached(site)

    async def _read(
        self,
        site: Site,
        requests: AsyncIterator[pb.SiteMessage],
        link: SiteLink,
        silence: Silence,
        context: Context,
    ) -> None:
        """Take a site's messages until it ends the session or may no longer speak."""
        reason: FederationError = Unreachable("the connection was lost")
        try:
            # Not wait_for: it may swallow a cancellation, and once the call has ended its context may
            # not be asked for anything, or gRPC takes the process down.
            async for message in requests:
                if link.is_refused:
                    return
                peer = self._access.peer(context)  # its certificate may have expired since it attached
                site.heard()
                silence.broken()
                kind = message.WhichOneof("kind")
                if kind in self._handlers:
                    told = getattr(message, kind)
                    if self._is_own(peer, kind, getattr(told, "assignment_id", None)):
                        self._handlers[kind](site.name, told)
            link.finish()
            return
        except grpc.aio.UsageError:
            pass  # the connection is gone
        except FederationError as error:
            reason = error
        except Exception:
            logger.exception("session failed by an error of the coordinator's own", extra={"site": site.name})
            reason = FederationError("internal error; the coordinator's log has its cause")
        link.give_up(reason)

    @contextmanager
    def _audited(self, site: Site, context: Context) -> Iterator[None]:
        peer, certificate = self._access.peer(context), self._access.certificate(context)
        facts = {} if certificate is None else {"certificate": f"{certificate.serial:x}"}
        if certificate is not None and self._gate.trust is not None:
            site.certificate_expires_s = certificate.expires.timestamp()
            self._gate.trust.noticed(certificate)
        self._log.audit_often(peer, "session.began", peer.name, caller=context.peer(), **facts)
        try:
            yield
        finally:
            self._log.audit_often(peer, "session.ended", peer.name)

    def _is_own(self, peer: Peer, kind: str, assignment_id: str | None) -> bool:
        """Whether a message is heard: what a site says of work that was never its own is only recorded.

        An answer would hold the id, which may be long, until the site reads it.
        """
        if assignment_id is None:
            return True
        if len(assignment_id) <= ASSIGNMENT_CHARACTERS and site_of(assignment_id) == peer.name:
            return True
        facts = {"site": peer.name, "kind": kind, "assignment": short(assignment_id)}
        if (untold := self._foreign.untold(peer.name)) is not None:
            logger.warning("a site speaks of work that is not its own", extra=facts | untold_fact(untold))
        self._log.audit_often(peer, "message.refused", short(assignment_id), kind=kind)
        return False

    def _pace_s(self) -> float:
        """Seconds between a new session's heartbeats: the more sites, the more seconds."""
        return max(
            self._heartbeat_s, min(LONGEST_HEARTBEAT_S, self._sites.count_connected / HEARTBEATS_PER_S)
        )

    def _progress(self, site: str, progress: pb.Progress) -> None:
        self._reports.progress(
            site,
            SiteProgress(
                site=site, round=0, work=Work.TRAIN, assignment_id=progress.assignment_id,
                phase=phase_name(progress.phase), done=progress.done, total=progress.total,
                loss=progress.loss if progress.HasField("loss") else None,
                tokens_per_s=progress.tokens_per_s if progress.HasField("tokens_per_s") else None,
            ),
        )  # fmt: skip

    def _outcome(self, site: str, outcome: pb.Outcome) -> None:
        result = Result(
            examples=outcome.examples, tokens=outcome.tokens, metrics=_numbers(outcome.metrics),
            phase_seconds=_seconds(outcome.phase_seconds), update_digest=outcome.update_digest,
            update_bytes=outcome.update_bytes, data_examples=outcome.data_examples,
            weights=_numbers(outcome.metric_weights), counts=_counts(outcome.metric_counts),
            before=_measured(outcome.before) if outcome.HasField("before") else None,
        )  # fmt: skip
        self._reports.finished(site, outcome.assignment_id, result)


def _text(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + " …"


def _measured(told: pb.Measurement) -> SiteMetrics:
    return SiteMetrics(
        examples=told.examples, tokens=told.tokens, metrics=_numbers(told.metrics),
        weights=_numbers(told.metric_weights), counts=_counts(told.metric_counts),
    )  # fmt: skip


def _counts(counts: Mapping[str, pb.Counts]) -> dict[str, Sequence[int]]:
    return _numbers({name: tuple(told.values) for name, told in counts.items()})


def _numbers(numbers: Mapping[str, Kept]) -> dict[str, Kept]:
    return {_PLAIN.sub("_", short(name)): numbers[name] for name in sorted(numbers)[:NUMBERS]}


def _seconds(numbers: Mapping[str, float]) -> dict[str, float]:
    return {
        name: number for name, number in _numbers(numbers).items() if math.isfinite(number) and number >= 0
    }
