"""The queue of runs and the life of each, from submission to its end."""

import asyncio
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from fedloom_common.errors import FederationError, StorageUnavailable, WrongState
from fedloom_common.runspec import RunSpec, Sync, parse_run_spec
from fedloom_server.buffered import run_buffered
from fedloom_server.codecs import require_codable
from fedloom_server.models import MODEL_FILE, prepare_model
from fedloom_server.records import AssignmentState, Run, RunState
from fedloom_server.rounds import Federation, run_rounds
from fedloom_server.selection import find_policy
from fedloom_server.store import new_run_id

logger = logging.getLogger(__name__)


class Runs:
    """Takes runs, works them off in order of submission, ends them."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._store = federation.store
        self._queue_changed = asyncio.Event()
        self._under_way: tuple[str, asyncio.Task[str]] | None = None
        self._idle = asyncio.Event()
        self._stopping: dict[str, str] = {}

    async def submit(self, spec_text: str) -> Run:
        """Check a run spec, make its initial model and queue the run.

        Raises:
            BadSpec: the spec or the model it names is wrong; nothing is queued.
        """
        spec = parse_run_spec(spec_text)
        find_policy(spec.cohort.policy)  # before a model is made in vain
        folder = self._store.spool.new_workshop()
        try:
            await prepare_model(spec, folder)
            return await self.enqueue(spec, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def enqueue(self, spec: RunSpec, folder: Path) -> Run:
        """Queue a run whose initial model, a folder of files, is made; the files move into the store.

        Raises:
            BadSpec: the run's codecs cannot encode the model, or there is no such selection policy.
        """
        find_policy(spec.cohort.policy)
        require_codable(spec.transport, folder / MODEL_FILE)
        files = await asyncio.to_thread(self._take_in, folder)
        model = next(file for file in files if file["name"] == MODEL_FILE)
        run = Run(
            id=new_run_id(), name=spec.name, spec_json=spec.model_dump_json(), state=RunState.QUEUED,
            submitted_at_s=time.time(), assets=[file for file in files if file is not model],
            model_digest=model["digest"], model_bytes=model["size_bytes"],
        )  # fmt: skip
        self._store.save(run)
        self._queue_changed.set()
        logger.info(
            "run submitted", extra={"run": run.id, "name_of_run": run.name, "model_bytes": run.model_bytes}
        )
        return run

    def _take_in(self, folder: Path) -> list[dict[str, Any]]:
        files = []
        for path in sorted(folder.iterdir()):
            stored = self._store.files.put(path)
            files.append({"name": path.name, "digest": stored.digest, "size_bytes": stored.size_bytes})
        return files

    async def stop(self, run_id: str, reason: str) -> Run:
        """End a run, and return when it has ended; its last global model stays.

        Raises:
            NotFound, WrongState: there is no such run, or it has ended.
        """
        run = self._store.run(run_id)
        if run.state.is_end:
            raise WrongState(f"run {run.id} has ended already: {run.state}, {run.reason}")
        self._stopping[run.id] = reason or "stopped by an operator"
        if self._under_way is not None and self._under_way[0] == run.id:
            rounds = self._under_way[1]
            rounds.cancel()
            await asyncio.wait([rounds])
            await self._idle.wait()
            return self._store.run(run.id)
        return self._end(run, RunState.STOPPED, self._stopping.pop(run.id))

    def resume(self, run_id: str) -> Run:
        """Queue a stopped or failed run again, to go on after its last finished round.

        Raises:
            NotFound, WrongState: there is no such run, or it is not stopped or failed.
        """
        run = self._store.run(run_id)
        if run.state not in (RunState.STOPPED, RunState.FAILED):
            raise WrongState(f"run {run.id} is {run.state}; only a stopped or failed run can be resumed")
        run.paused_s += time.time() - run.ended_at_s
        run.state, run.reason, run.ended_at_s = RunState.QUEUED, "", 0.0
        self._store.begin_again(run)
        self._queue_changed.set()
        return run

    async def work(self) -> None:
        """Work off the queue, for ever. Cancelling keeps every run as it is, to go on after a restart."""
        self._store.clear_spool()
        while True:
            waiting = self._store.runs(RunState.RUNNING) or self._store.runs(RunState.QUEUED)
            if waiting:
                await self._perform(waiting[0])
            else:
                await self._queue_changed.wait()
            self._queue_changed.clear()

    async def _perform(self, run: Run) -> None:
        run.state, run.reason = RunState.RUNNING, ""
        run.started_at_s = run.started_at_s or time.time()
        self._store.save(run)
        self._federation.watching.tell(run.id, run)
        logger.info("run under way", extra={"run": run.id, "rounds_done": run.rounds_done})
        play = run_rounds if isinstance(run.spec.mode, Sync) else run_buffered
        rounds = asyncio.create_task(play(run, self._federation))
        self._under_way = (run.id, rounds)
        self._idle.clear()
        try:
            reason = await rounds
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if run.id not in self._stopping or (task is not None and task.cancelling()):
                raise  # the coordinator shuts down: the run goes on after the next start
            self._end(run, RunState.STOPPED, self._stopping.pop(run.id))
        except StorageUnavailable:
            raise  # the run goes on when the database is back
        except FederationError as error:
            self._end(run, RunState.FAILED, str(error))
        except Exception as error:
            logger.exception("run failed by an error of the coordinator's own", extra={"run": run.id})
            self._end(run, RunState.FAILED, f"internal error of the coordinator, see its log: {error!r}")
        else:
            self._end(run, RunState.FINISHED, reason)
        finally:
            self._under_way = None
            self._stopping.pop(run.id, None)
            self._idle.set()

    def _end(self, run: Run, state: RunState, reason: str) -> Run:
        run.state, run.reason, run.ended_at_s = state, reason, time.time()
        still_open = [a for a in self._store.assignments(run.id) if a.state is AssignmentState.OPEN]
        for assignment in still_open:
            assignment.state, assignment.reason = AssignmentState.CANCELLED, f"the run was {state}"
        rounds = [] if state is RunState.FINISHED else self._store.close_rounds(run)
        self._store.save(run, *rounds, *still_open)
        self._store.clear_spool()
        self._store.spool.spares.clear()
        if state is RunState.FINISHED:
            shutil.rmtree(self._store.spool.residual_folder(run.id), ignore_errors=True)
        for site in self._federation.sites.all():
            if site.link is not None:
                site.link.run_ended(run.id, may_resume=state is not RunState.FINISHED)
        self._federation.watching.tell(run.id, run)
        logger.info("run ended", extra={"run": run.id, "state": state, "reason": reason})
        return run
