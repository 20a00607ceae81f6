"""What this site has been asked to do: in order, once each, and answered again when asked again.

Of one run one assignment is done at a time: its rounds share an optimizer, a worker group and a residual.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from fedloom_client.deliveries import Deliveries
from fedloom_client.groups import WarmGroups
from fedloom_client.mailbox import Mailbox
from fedloom_client.messages import Answer, Assignment, Failure, Outcome, Progress, Refusal
from fedloom_client.outbox import Outbox
from fedloom_client.work import Performer

ANSWERS_KEPT = 256  # to answer again; the coordinator asks again only for what is open
LEAVING = "the site drains: its operator is about to stop it"
RESEND_S = 600.0  # what is not sent again so long after a reconnect is no longer wanted

logger = logging.getLogger(__name__)


@dataclass
class _Waiting:
    assignment: Assignment
    deadline_at_s: float | None
    task: asyncio.Task[Answer] | None = None
    is_unwanted: bool = False


@dataclass(frozen=True)
class _Answered:
    run_id: str
    answer: Answer


class Assignments:
    """The queue of work."""

    def __init__(
        self,
        performer: Performer,
        *,
        mailbox: Mailbox,
        outbox: Outbox,
        deliveries: Deliveries,
        groups: WarmGroups,
        at_once: int = 1,
    ) -> None:
        """``at_once`` is how many assignments, of as many runs, may be done at the same time."""
        self._performer = performer
        self._mailbox = mailbox
        self._outbox = outbox
        self._deliveries = deliveries
        self._groups = groups
        self._at_once = at_once
        self._queue: OrderedDict[str, _Waiting] = OrderedDict()
        self._answers: OrderedDict[str, _Answered] = OrderedDict()
        self._runs_under_way: set[str] = set()
        self._unconfirmed: set[str] = set()
        self._draining = False
        self._leaving = False
        self._changed = asyncio.Event()
        self._chores: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Do the work as it comes, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await self._changed.wait()
                    self._changed.clear()
                    while (waiting := self._next()) is not None:
                        self._begin(waiting)
                        tasks.create_task(self._do(waiting))
                    self._tell_queued()
        finally:
            self._stop_expiry()
            await asyncio.gather(*self._chores, return_exceptions=True)

    def open_ids(self) -> list[str]:
        """Assignments that are under way, or finished and not delivered."""
        return [*self._queue, *self._outbox]

    def kept_ids(self) -> list[str]:
        """The open ones, and those whose training was put aside: the coordinator is to say what it wants."""
        return list(dict.fromkeys([*self.open_ids(), *self._outbox.aside()]))

    def kept_runs(self) -> list[str]:
        """Runs of which anything is kept: one may have ended while there was no session to tell it over."""
        return sorted({*self._outbox.runs(), *self._groups.kept_runs()})

    def attached(self) -> None:
        """A session is open: the coordinator now sends again what it still wants."""
        self._draining = False
        self._changed.set()
        self._stop_expiry()
        self._unconfirmed = set(self.kept_ids())
        self._expiry = asyncio.get_running_loop().call_later(RESEND_S, self._drop_unconfirmed)

    def detached(self) -> None:
        """The session is gone; work goes on."""
        self._stop_expiry()

    def receive(self, assignment: Assignment) -> None:
        """Take an assignment on, or answer one that was answered before."""
        self._unconfirmed.discard(assignment.id)
        finished, answered = self._outbox.get(assignment.id), self._answers.get(assignment.id)
        if finished is not None:
            self._send_outcome(finished.outcome)
        elif answered is not None:
            self._mailbox.post(answered.answer)
        elif self._leaving and assignment.id not in self._queue:
            self._mailbox.post(Refusal(assignment_id=assignment.id, reason=LEAVING))
        elif assignment.id not in self._queue:
            for name in self._outbox.superseded_by(assignment):
                # else it may count: its receipt is to tell, or it is yet to be offered
                if not (self._deliveries.is_under_way(name) or name in self._queue):
                    self._forget(name, "a later attempt or round has begun")
            deadline_at_s = asyncio.get_running_loop().time() + assignment.deadline_s
            self._queue[assignment.id] = _Waiting(
                assignment, deadline_at_s if assignment.deadline_s else None
            )
        self._changed.set()

    def grant(self, assignment_id: str, upload: str, offset: int) -> None:
        """Upload a finished training."""
        self._deliveries.begin(assignment_id, upload, offset)

    def cancel(self, assignment_id: str, reason: str, *, counts: bool) -> None:
        """Stop work on an assignment, and keep nothing of it but what an update that has come left."""
        if counts:
            self._outbox.delivered(assignment_id)
        self._forget(assignment_id, reason)

    def fail(self, assignment_id: str, reason: str) -> None:
        """Report an assignment that cannot be done."""
        self._conclude(Failure(assignment_id=assignment_id, reason=reason))

    def drain(self, reason: str) -> None:
        """Begin nothing new until the next session; what is under way goes on."""
        logger.info("the coordinator goes away", extra={"reason": reason})
        self._draining = True

    def leave(self) -> None:
        """Take nothing new on, and refuse what has not begun; what is under way is done and delivered."""
        logger.info("the site drains", extra={"open": len(self.open_ids())})
        self._leaving = True
        for waiting in [item for item in self._queue.values() if item.task is None]:
            del self._queue[waiting.assignment.id]
            self._mailbox.post(Refusal(assignment_id=waiting.assignment.id, reason=LEAVING))

    def end_run(self, run_id: str, *, may_resume: bool) -> None:
        """Stop a run's work and let what belongs to it go; all but its own files if it may be resumed."""
        for name in [name for name, item in self._answers.items() if item.run_id == run_id]:
            del self._answers[name]
        waiting = [name for name, item in self._queue.items() if item.assignment.run_id == run_id]
        for name in dict.fromkeys((*waiting, *self._outbox.of_run(run_id))):
            self._forget(name, "the run has ended")
        self._outbox.end_run(run_id)
        self._start(self._groups.end_run(run_id, may_resume=may_resume))

    def _next(self) -> _Waiting | None:
        """The first in the queue that may begin now."""
        if self._draining or len(self._runs_under_way) >= self._at_once:
            return None
        free = (item for item in self._queue.values() if item.assignment.run_id not in self._runs_under_way)
        return next((item for item in free if item.task is None), None)

    def _tell_queued(self) -> None:
        """Say what has yet to begin: it is not given up while other work is done."""
        for name, waiting in self._queue.items():
            if waiting.task is None:
                self._mailbox.note(Progress(assignment_id=name, phase="queued"))

    def _begin(self, waiting: _Waiting) -> None:
        assignment = waiting.assignment
        facts = {"assignment": assignment.id, "run": assignment.run_id, "round": assignment.round}
        logger.info("work begins", extra=facts | {"work": assignment.work})
        self._runs_under_way.add(assignment.run_id)
        waiting.task = asyncio.create_task(
            self._performer.answer(assignment, waiting.deadline_at_s, self._mailbox.note)
        )

    async def _do(self, waiting: _Waiting) -> None:
        assignment, task = waiting.assignment, waiting.task
        assert task is not None, "it has begun"
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            await asyncio.wait({task})
            if self._queue.get(assignment.id) is waiting:
                del self._queue[assignment.id]
            self._runs_under_way.discard(assignment.run_id)
            self._changed.set()
        if waiting.is_unwanted:
            self._drop(assignment.id)
        else:
            self._conclude(task.result(), assignment.run_id)

    def _conclude(self, answer: Answer, run_id: str = "") -> None:
        name = answer.assignment_id
        if isinstance(answer, Outcome):
            logger.info("work done", extra={"assignment": name, "examples": answer.examples})
        else:
            facts = {"assignment": name, type(answer).__name__.lower(): answer.reason}
            if isinstance(answer, Failure) and answer.kept:
                facts["details"] = answer.kept
            logger.warning("work not done", extra=facts)
        if isinstance(answer, Outcome) and answer.update_digest:
            self._send_outcome(answer)
            return
        self._answers[name] = _Answered(run_id, answer)
        while len(self._answers) > ANSWERS_KEPT:
            self._answers.popitem(last=False)
        self._mailbox.post(answer)

    def _send_outcome(self, outcome: Outcome) -> None:
        self._mailbox.post(outcome)
        self._mailbox.note(Progress(assignment_id=outcome.assignment_id, phase="wait"))

    def _forget(self, name: str, reason: str) -> None:
        if name in self.open_ids():
            logger.info("work no longer wanted", extra={"assignment": name, "reason": reason})
        waiting = self._queue.pop(name, None)
        if waiting is None or waiting.task is None:
            self._drop(name)
        else:
            waiting.is_unwanted = True
            waiting.task.cancel()

    def _drop(self, name: str) -> None:
        self._deliveries.withdraw(name)
        self._outbox.remove(name)
        self._answers.pop(name, None)
        self._mailbox.forget(name)

    def _drop_unconfirmed(self) -> None:
        for name in self._unconfirmed.intersection(self.kept_ids()):
            self._forget(name, "the coordinator did not ask for it again after a reconnect")

    def _stop_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()

    def _start(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
