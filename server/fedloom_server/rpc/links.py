"""What the coordinator says to one site, as messages in order."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict

from fedloom.v1 import session_pb2 as pb
from fedloom_common.errors import FederationError, NotPermitted, Unreachable
from fedloom_server.adapters.parts import PartFile, Parts
from fedloom_server.downlink import Delta
from fedloom_server.records import Assignment, Run
from fedloom_server.rpc.hellos import PROTOCOL_VERSION
from fedloom_server.rpc.messages import blob, delta_message, work_message

OUTBOX_MESSAGES = 1000  # a site that reads nothing while so many wait is gone

logger = logging.getLogger(__name__)


class Silence:
    """Gives up a session whose site says nothing for too long.

    One timer a session, set again only when it fires: waiting with a timeout for each message costs a
    task and a timer for each, and a thousand idle sites send a hundred a second.
    """

    def __init__(self, longest_s: float, give_up: Callable[[FederationError], object], site: str) -> None:
        self._longest_s = longest_s
        self._give_up = give_up
        self._site = site
        self._loop = asyncio.get_running_loop()
        self._heard_at_s = self._loop.time()
        self._timer = self._loop.call_later(longest_s, self._look)

    def broken(self) -> None:
        """The site has said something."""
        self._heard_at_s = self._loop.time()

    def end(self) -> None:
        """The session has ended."""
        self._timer.cancel()

    def _look(self) -> None:
        over_at_s = self._heard_at_s + self._longest_s
        if self._loop.time() < over_at_s:
            self._timer = self._loop.call_at(over_at_s, self._look)
            return
        logger.warning("site is silent", extra={"site": self._site, "silence_s": self._longest_s})
        self._give_up(Unreachable(f"the site was silent for {self._longest_s:g} s"))


class SiteLink:
    """Messages to one site, in order."""

    def __init__(self, model_name: str, give_up: Callable[[FederationError], object]) -> None:
        """``give_up`` ends the session at once, with a reason, whatever has yet to be sent."""
        self._model_name = model_name
        self.give_up = give_up
        self.is_refused = False
        self._outbox: asyncio.Queue[pb.CoordinatorMessage | None] = asyncio.Queue()

    def assign(
        self,
        assignment: Assignment,
        run: Run,
        delta: Delta | None,
        folds: Sequence[PartFile] = (),
        counted_round: int | None = None,
    ) -> None:
        """Send an assignment, with a smaller way to its model and what is folded under it, if any."""
        spec = run.spec
        model = pb.Blob(
            name=self._model_name, digest=assignment.model_digest, size_bytes=assignment.model_bytes
        )
        message = pb.Assignment(
            id=assignment.id, work=work_message(assignment.work), run_id=run.id,
            round=assignment.site_round,
            schedule_round=assignment.round - assignment.staleness if assignment.turn else 0,
            attempt=assignment.attempt, model=model, assets=[blob(asset) for asset in run.assets],
            spec_json=run.spec_json, deadline_s=spec.cohort.deadline_s or 0, stall_s=spec.cohort.stall_s,
            frozen=[blob(asdict(file)) for file in Parts.from_json(run.adapter).frozen],
            folds=[blob(asdict(file)) for file in folds],
            delta=None if delta is None else delta_message(delta), measures=assignment.measures,
            alone_rounds=assignment.alone_rounds, counted_round=counted_round,
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

    def displace(self) -> None:
        """End the session for a newer one; at once, if the site has yet to read what was sent over this."""
        reason = "the site has attached again"
        if self._outbox.empty():
            self.close(reason)
        else:
            self.give_up(Unreachable(reason))

    def refuse(self, reason: str) -> None:
        """End the session at once; the site may not attach again before a person has changed something."""
        self.is_refused = True  # what is on its way from it no longer counts
        self.give_up(NotPermitted(reason))

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
            self.give_up(Unreachable(f"the site has read none of {OUTBOX_MESSAGES} messages"))
