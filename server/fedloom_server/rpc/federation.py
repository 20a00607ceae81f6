"""The gRPC edge of sites' sessions: messages to calls, and calls to messages."""

import asyncio
import logging
import math
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc

from fedloom.v1 import session_pb2 as pb
from fedloom.v1.session_pb2_grpc import FederationServiceServicer
from fedloom_common.errors import FederationError, ProtocolError
from fedloom_server.assignments import Assignments, Result
from fedloom_server.downlink import Delta
from fedloom_server.records import Assignment, Run, Work
from fedloom_server.rpc.access import Access
from fedloom_server.rpc.messages import blob, delta_message, phase_name, work_message
from fedloom_server.sites import Description, Device, Site, Sites
from fedloom_server.watching import SiteProgress

PROTOCOL_VERSION = 1
HELLO_S = 20.0  # a peer that opened a session has so long to say who it is
MISSED_HEARTBEATS = 3
OUTBOX_MESSAGES = 1000  # a site that reads nothing while so many wait is gone
# What a site may say at most: it is kept, and shown to operators.
TEXT_CHARACTERS = 16_000
NAME_CHARACTERS = 200
NUMBERS = 64
DEVICES = 256
DATA_SETS = 1000
OPEN_ASSIGNMENTS = 1000
KEPT_RUNS = 1000

_PLAIN = re.compile(r"[^A-Za-z0-9_.-]")
"""What a metric's name may not have: it stands in logs and tables."""

Context = grpc.aio.ServicerContext[pb.SiteMessage, pb.CoordinatorMessage]

logger = logging.getLogger(__name__)


class SiteLink:
    """Messages to one site, in order."""

    def __init__(self, model_name: str, give_up: Callable[[], object]) -> None:
        """``give_up`` ends the session at once, whatever has yet to be sent."""
        self._model_name = model_name
        self.give_up = give_up
        self._outbox: asyncio.Queue[pb.CoordinatorMessage | None] = asyncio.Queue()

    def assign(self, assignment: Assignment, run: Run, delta: Delta | None) -> None:
        """Send an assignment, with a smaller way to its model if there is one."""
        spec = run.spec
        model = pb.Blob(
            name=self._model_name, digest=assignment.model_digest, size_bytes=assignment.model_bytes
        )
        message = pb.Assignment(
            id=assignment.id, work=work_message(assignment.work), run_id=run.id, round=assignment.round,
            attempt=assignment.attempt, model=model, assets=[blob(asset) for asset in run.assets],
            spec_json=run.spec_json, deadline_s=spec.cohort.deadline_s or 0, stall_s=spec.cohort.stall_s,
            delta=None if delta is None else delta_message(delta),
        )  # fmt: skip
        self._put(pb.CoordinatorMessage(assignment=message))

    def grant(self, assignment_id: str, offset: int) -> None:
        """Give leave to upload from an offset; an upload has its assignment's id."""
        grant = pb.UploadGrant(assignment_id=assignment_id, upload=assignment_id, offset=offset)
        self._put(pb.CoordinatorMessage(upload_grant=grant))

    def cancel(self, assignment_id: str, reason: str, *, counts: bool = False) -> None:
        """Say that an assignment is no longer wanted, or that its update has come and counts."""
        cancel = pb.Cancel(assignment_id=assignment_id, reason=reason, counts=counts)
        self._put(pb.CoordinatorMessage(cancel=cancel))

    def run_ended(self, run_id: str, *, may_resume: bool) -> None:
        """Say that a run has ended, for good or until an operator resumes it."""
        self._put(pb.CoordinatorMessage(run_ended=pb.RunEnded(run_id=run_id, may_resume=may_resume)))

    def close(self, reason: str) -> None:
        """Tell the site to attach again later, and end the session."""
        self._put(pb.CoordinatorMessage(drain=pb.Drain(reason=reason)))
        self.finish()

    def welcome(self, site: str, heartbeat_s: float) -> None:
        """Accept the session."""
        welcome = pb.Welcome(protocol_version=PROTOCOL_VERSION, site=site, heartbeat_s=heartbeat_s)
        self._put(pb.CoordinatorMessage(welcome=welcome))

    def finish(self) -> None:
        """End the session after what has yet to be sent."""
        self._outbox.put_nowait(None)

    async def messages(self) -> AsyncIterator[pb.CoordinatorMessage]:
        """What is to be sent, until the link is closed."""
        while (message := await self._outbox.get()) is not None:
            yield message

    def _put(self, message: pb.CoordinatorMessage) -> None:
        if self._outbox.qsize() < OUTBOX_MESSAGES:
            self._outbox.put_nowait(message)
        else:
            self.give_up()


class FederationEdge(FederationServiceServicer):
    """Attach: one session of one site."""

    def __init__(
        self, access: Access, sites: Sites, assignments: Assignments, *, heartbeat_s: float, model_name: str
    ) -> None:
        self._access = access
        self._sites = sites
        self._assignments = assignments
        self._heartbeat_s = heartbeat_s
        self._model_name = model_name
        self._handlers: Mapping[str, Callable[[str, Any], None]] = {
            "progress": self._progress,
            "outcome": self._outcome,
            "refusal": lambda site, told: assignments.refused(site, told.assignment_id, _text(told.reason)),
            "failure": lambda site, told: assignments.failed(site, told.assignment_id, _text(told.reason)),
            "heartbeat": lambda site, told: None,
        }

    async def Attach(  # noqa: N802 (the contract's name)
        self, request_iterator: AsyncIterator[pb.SiteMessage], context: Context
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        """Serve a session until either side ends it or the site is silent."""
        site = self._access.peer(context).name
        hello = await _hello(request_iterator)
        handler = asyncio.current_task()
        assert handler is not None, "a handler runs in a task"
        link = SiteLink(self._model_name, handler.cancel)
        try:
            with self._sites.attached(site, _description(hello), link) as entry:
                link.welcome(site, self._heartbeat_s)
                self._assignments.attached(
                    site, hello.open_assignments[:OPEN_ASSIGNMENTS], hello.kept_runs[:KEPT_RUNS]
                )
                reading = asyncio.create_task(self._read(entry, request_iterator, link, context))
                try:
                    async for message in link.messages():
                        yield message
                finally:
                    reading.cancel()
        finally:
            if self._sites.link(site) is None:  # no newer session has taken its place
                self._assignments.detached(site)

    async def _read(
        self, site: Site, requests: AsyncIterator[pb.SiteMessage], link: SiteLink, context: Context
    ) -> None:
        """Take a site's messages until it ends the session, misses its heartbeats or may no longer speak."""
        silence_s = MISSED_HEARTBEATS * self._heartbeat_s
        try:
            while True:
                message = await asyncio.wait_for(anext(requests), silence_s)
                self._access.peer(context)  # its certificate may have expired since it attached
                site.heard()
                kind = message.WhichOneof("kind")
                if kind in self._handlers:
                    self._handlers[kind](site.name, getattr(message, kind))
        except StopAsyncIteration:
            link.finish()
            return
        except grpc.aio.UsageError:
            pass  # the connection is gone
        except TimeoutError:
            logger.warning("site is silent", extra={"site": site.name, "silence_s": silence_s})
        except FederationError as error:
            logger.warning("session ended", extra={"site": site.name, "reason": str(error)})
        except Exception:
            logger.exception("session failed by an error of the coordinator's own", extra={"site": site.name})
        link.give_up()

    def _progress(self, site: str, progress: pb.Progress) -> None:
        self._assignments.progress(
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
            update_bytes=outcome.update_bytes,
        )  # fmt: skip
        self._assignments.finished(site, outcome.assignment_id, result)


async def _hello(requests: AsyncIterator[pb.SiteMessage]) -> pb.Hello:
    try:
        first = await asyncio.wait_for(anext(requests), HELLO_S)
    except StopAsyncIteration:
        raise ProtocolError("a session begins with Hello; nothing came") from None
    except TimeoutError:
        raise ProtocolError(f"a session begins with Hello; nothing came in {HELLO_S:g} s") from None
    if first.WhichOneof("kind") != "hello":
        raise ProtocolError(f"a session begins with Hello; {first.WhichOneof('kind')} came")
    if first.hello.protocol_version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the site speaks protocol version {first.hello.protocol_version} ({first.hello.software}), "
            f"the coordinator version {PROTOCOL_VERSION}: install matching releases"
        )
    return first.hello


def _description(hello: pb.Hello) -> Description:
    devices = (
        Device(kind=_name(device.kind), name=_name(device.name), memory_bytes=device.memory_bytes)
        for device in hello.devices[:DEVICES]
    )
    return Description(
        software=_name(hello.software),
        memory_bytes=hello.memory_bytes,
        devices=tuple(devices),
        data_sets={_name(data.name): data.size_bytes for data in hello.data_sets[:DATA_SETS]},
    )


def _text(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + " …"


def _name(text: str) -> str:
    return text[:NAME_CHARACTERS]


def _numbers(numbers: Mapping[str, float]) -> dict[str, float]:
    return {_PLAIN.sub("_", _name(name)): numbers[name] for name in sorted(numbers)[:NUMBERS]}


def _seconds(numbers: Mapping[str, float]) -> dict[str, float]:
    return {
        name: number for name, number in _numbers(numbers).items() if math.isfinite(number) and number >= 0
    }
