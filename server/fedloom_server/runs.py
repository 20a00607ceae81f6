"""The queue of runs and the life of each, to its end."""

import asyncio
import contextlib
import logging
import shutil
import time
import traceback

from fedloom_common.errors import AttemptFailed, FederationError, StorageUnavailable, TooFewSites, WrongState
from fedloom_common.partial import discard
from fedloom_common.runspec import Sync
from fedloom_server.batches import require_sites
from fedloom_server.buffered import run_buffered
from fedloom_server.clock import now_s
from fedloom_server.closing import train_alone
from fedloom_server.cohorts import sites_needed, wanted
from fedloom_server.ends import begin_again, close_rounds
from fedloom_server.failures import failure_of_run
from fedloom_server.federation import Federation
from fedloom_server.records import AssignmentState, Base, RoundState, Run, RunState
from fedloom_server.retention import bring_models
from fedloom_server.rounds import run_rounds
from fedloom_server.sites import LOOK_S
from fedloom_server.submissions import Submissions
from fedloom_server.waiting import Wait

RESUMABLE = (RunState.PAUSED, RunState.WAITING, RunState.STOPPED, RunState.FAILED)
WAIT_LOOK_S = 1.0  # between two looks at runs that wait for time to pass
BROKEN_S = 10.0

logger = logging.getLogger(__name__)


class Runs:
    """Works runs off by priority and in order of submission, holds and ends them."""

    def __init__(self, federation: Federation, *, concurrent_runs: int) -> None:
        self._federation = federation
        self._store = federation.store
        self._concurrent_runs = concurrent_runs
        self._changed = asyncio.Event()
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._asked_for: dict[str, tuple[RunState, str]] = {}
        """What operators want of runs that are under way: a state, and why."""
        self._broke_by: dict[str, BaseException] = {}
        """Why the end of a run, or what was asked of it, could not be written when it was last under way."""
        self._waits: dict[str, Wait] = {}
        self._failures: dict[str, int] = {}
        """Times in a row that a run has had to wait because its sites, or the disk, failed it."""
        self._not_before_s: dict[str, float] = {}
        self.submissions = Submissions(self._store, on_queued=self._changed.set)
        """Where runs come from."""
        federation.sites.when_changed(self._sites_changed)

    def _sites_changed(self) -> None:
        if self._waits:
            self._changed.set()

    async def stop(self, run_id: str, reason: str) -> Run:
        """End a run, and return when it has ended; its last global model stays.

        Raises:
            NotFound, WrongState: there is no such run, or it has ended.
        """
        return await self._interrupt(run_id, RunState.STOPPED, reason or "stopped by an operator")

    async def pause(self, run_id: str, reason: str) -> Run:
        """Hold a run where it is until it is resumed: the round under way keeps the updates that have come.

        Raises:
            NotFound, WrongState: there is no such run, or it has ended or is paused already.
        """
        if self._store.run(run_id).state is RunState.PAUSED:
            raise WrongState(f"run {self._store.run(run_id).id} is paused already")
        return await self._interrupt(run_id, RunState.PAUSED, reason or "paused by an operator")

    async def _interrupt(self, run_id: str, state: RunState, reason: str) -> Run:
        """Take a run out of work into a state that an operator asked for."""
        run = self._store.run(run_id)
        if run.state.is_end:
            raise WrongState(f"run {run.id} has ended already: {run.state}, {run.reason}")
        if run.id not in self._under_way:
            self._leave(run, state, reason)
            return run
        task, is_ending = self._under_way[run.id], run.id in self._asked_for
        self._asked_for[run.id] = (state, reason)
        if not is_ending:  # another cancellation would break off what waits for threads and versions
            task.cancel()
        await asyncio.wait([task])
        run = self._store.run(run.id)
        if run.state.goes_on_by_itself and (error := self._broke_by.get(run.id)):
            raise error
        return run

    def resume(self, run_id: str) -> Run:
        """Queue a run again: a paused or waiting one goes on in its round, an ended one after its last.

        Raises:
            NotFound, WrongState: there is no such run, or it goes on anyway, or is finished.
        """
        run = self._store.run(run_id)
        if run.state not in RESUMABLE:
            raise WrongState(
                f"run {run.id} is {run.state}; only a paused, waiting, stopped or failed run can be resumed"
            )
        begins_again, interrupted_at_s = run.state.is_end, run.paused_at_s or run.ended_at_s
        run.paused_s += time.time() - interrupted_at_s if interrupted_at_s else 0.0
        run.state, run.reason, run.ended_at_s, run.paused_at_s = RunState.QUEUED, "", 0.0, 0.0
        if begins_again:
            begin_again(self._store, run)
        else:
            unfinished = self._store.unfinished_rounds(run.id)
            for record in unfinished:
                record.asked_at_s = time.time()  # its sites begin again, and with them the deadline
            self._store.save(run, *unfinished)
        self._waits.pop(run.id, None)
        self._tell(run)
        self._changed.set()
        return run

    async def work(self) -> None:
        """Work off the queue, for ever. Cancelling keeps every run as it is, to go on after a restart."""
        self._store.clear_spool()
        try:
            while True:
                self._changed.clear()
                self._end_waits()
                self._begin_next()
                await self._until_changed()
        finally:
            await self._let_go()

    async def _until_changed(self) -> None:
        """Sleep until something may be done; to runs that wait, many sites at once are one change."""
        due_s = WAIT_LOOK_S if self._waits or self._not_before_s else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(due_s):
                await self._changed.wait()
        if self._waits:
            await asyncio.sleep(LOOK_S)

    def _begin_next(self) -> None:
        """Begin as many runs as may be under way: those that were, then by priority, then as submitted."""
        broken = {name for name, until_s in self._not_before_s.items() if now_s() < until_s}
        self._not_before_s = {name: self._not_before_s[name] for name in broken}
        under_way = [run for run in self._store.runs(RunState.RUNNING) if run.id not in self._under_way]
        queued = sorted(self._store.runs(RunState.QUEUED), key=lambda run: -run.priority)
        for run in [run for run in (*under_way, *queued) if run.id not in broken]:
            if len(self._under_way) < self._concurrent_runs:
                self._begin(run)
            elif run.state is RunState.QUEUED and not run.reason:
                run.reason = (
                    f"waits for one of {self._concurrent_runs} runs under way to end (concurrent_runs)"
                )
                self._save(run)

    def _begin(self, run: Run) -> None:
        task = asyncio.create_task(self._perform(run), name=f"run {run.id}")
        self._under_way[run.id] = task
        self._broke_by.pop(run.id, None)
        task.add_done_callback(lambda task: self._performed(run.id, task))

    def _performed(self, run_id: str, task: asyncio.Task[None]) -> None:
        """A run is no longer under way; if its end could not be written, it is taken up again."""
        del self._under_way[run_id]
        asked = self._asked_for.pop(run_id, None)
        self._changed.set()
        error = None if task.cancelled() else task.exception()
        if error is None and asked is not None:
            try:
                self._obey(run_id, *asked)
            except (FederationError, OSError) as why:
                error = why
        if error is not None:
            logger.critical("a run broke off; it goes on in a while", extra={"run": run_id}, exc_info=error)
            self._not_before_s[run_id] = now_s() + BROKEN_S
            self._broke_by[run_id] = error

    def _obey(self, run_id: str, state: RunState, reason: str) -> None:
        """Do what was asked for before the run had begun, or as it began to wait: it has not heard of it."""
        run = self._store.run(run_id)
        if not run.state.is_end:
            self._leave(run, state, reason)

    async def _perform(self, run: Run) -> None:
        run.state, run.reason = RunState.RUNNING, ""
        run.started_at_s = run.started_at_s or time.time()
        self._save(run)
        rounds_before = run.rounds_done
        logger.info("run under way", extra={"run": run.id, "rounds_done": run.rounds_done})
        try:
            await bring_models(self._store, run)
            play = run_rounds if isinstance(run.spec.mode, Sync) else run_buffered
            reason = await play(run, self._federation)
            if run.spec.evaluation.alone:
                run.reason = f"{reason}; now each site trains alone, for the report"
                self._save(run)
                await train_alone(run, self._federation)
        except asyncio.CancelledError:
            if (asked := self._asked_for.pop(run.id, None)) is None:
                raise  # the coordinator shuts down: the run goes on after the next start
            self._leave(run, *asked)
        except StorageUnavailable:
            raise  # the run goes on when the database is back
        except AttemptFailed as error:
            if run.rounds_done > rounds_before:
                self._failures.pop(run.id, None)
            self._wait(run, error)
        except FederationError as error:
            self._leave(run, RunState.FAILED, str(error), error)
        except Exception as error:
            logger.exception("run failed by an error of the coordinator's own", extra={"run": run.id})
            reason = f"internal error of the coordinator, see its log: {error!r}"
            self._leave(run, RunState.FAILED, reason, error)
        else:
            self._leave(run, RunState.FINISHED, reason)

    def _leave(self, run: Run, state: RunState, reason: str, error: Exception | None = None) -> None:
        """Take a run out of work: it has ended or is paused."""
        self._waits.pop(run.id, None)
        self._failures.pop(run.id, None)
        run.state, run.reason = state, reason
        if state is RunState.PAUSED:
            run.paused_at_s = time.time()
            self._save(run)
            self._federation.assignments.call_off(run.id, "the run is paused")
        else:
            self._end(run, error)
        logger.info("run left", extra={"run": run.id, "state": state, "reason": reason})

    def _end(self, run: Run, error: Exception | None) -> None:
        run.ended_at_s = time.time()
        self._federation.assignments.drop(run.id)
        rows: list[Base] = [run]
        unsettled, spool = self._store.unsettled(run.id), self._store.spool
        arriving = [spool.update_path(a) for a in unsettled if a.state is AssignmentState.OPEN]
        for assignment in unsettled:
            is_open = assignment.state is AssignmentState.OPEN
            ended = f"the run was {run.state}"
            assignment.reason = ended if is_open else f"no round was left to take its late update: {ended}"
            assignment.state, assignment.is_late = AssignmentState.CANCELLED, False
            rows.append(assignment)
        closed = close_rounds(self._store, run, error)
        rows += closed
        if run.state is RunState.FAILED:
            rows.append(failure_of_run(run, _log_of(error)))
        self._store.save(*rows)
        for record in closed:
            if record.state is RoundState.FAILED:
                self._federation.meters.round_ended(record)
        for path in arriving:  # a stream may still write it, which must have no spare open
            discard(path)
        self._store.clear_spool(run.id)
        if len(self._under_way) <= 1:
            spool.spares.clear()  # nobody is left who would write over them
        if run.state is RunState.FINISHED:
            shutil.rmtree(spool.residual_folder(run.id), ignore_errors=True)
        for site in self._federation.sites.all():
            if site.link is not None:
                site.link.run_ended(run.id, may_resume=run.state is not RunState.FINISHED)
        self._tell(run)

    def _wait(self, run: Run, error: AttemptFailed) -> None:
        """Let a run wait: another attempt may succeed when sites have come or time has passed."""
        failures = 0
        if not isinstance(error, TooFewSites):
            failures = self._failures[run.id] = self._failures.get(run.id, 0) + 1
        wait = self._waits[run.id] = self._new_wait(run, failures)
        run.state, run.reason = RunState.WAITING, str(error)
        if failures:
            run.reason = f"{error}; {wait.text(now_s())}"
            self._store.save(run, failure_of_run(run))
            logger.warning("run waits", extra={"run": run.id, "reason": run.reason})
        else:
            self._store.save(run)
            logger.info("waiting for sites", extra={"run": run.id, "reason": run.reason})
        self._federation.assignments.drop(run.id)  # late ones, which would hold other runs' room to upload
        self._tell(run)

    def _new_wait(self, run: Run, failures: int) -> Wait:
        sessions = self._federation.sites.sessions(wanted(run.spec))
        return Wait(min_sites=sites_needed(run), sessions=sessions, failures=failures, now_s=now_s())

    def _end_waits(self) -> None:
        """Queue the waiting runs that may go on, and say of the others how many sites are there."""
        for run in self._store.runs(RunState.WAITING):
            wait = self._waits.get(run.id)
            if wait is None:  # the coordinator was started again
                wait = self._waits[run.id] = self._new_wait(run, 0)
            sessions = self._federation.sites.sessions(wanted(run.spec))
            if wait.is_over(sessions, now_s()):
                del self._waits[run.id]
                run.state, run.reason = RunState.QUEUED, ""
                self._save(run)
            elif wait.is_for_sites:
                self._say_who_is_missing(run)

    def _say_who_is_missing(self, run: Run) -> None:
        try:
            require_sites(run, self._federation.sites)
        except TooFewSites as error:
            if run.reason != str(error):
                run.reason = str(error)
                self._save(run)

    def _save(self, run: Run) -> None:
        self._store.save(run)
        self._tell(run)

    def _tell(self, run: Run) -> None:
        self._federation.watching.tell(run.id, run)

    async def _let_go(self) -> None:
        """Break off what is under way; it goes on when work begins again."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._waits.clear()


def _log_of(error: Exception | None) -> str:
    """The traceback of an error of the coordinator's own; a failure that has a name needs none."""
    if error is None or isinstance(error, FederationError):
        return ""
    return "".join(traceback.format_exception(error))
