"""THE asynchronous loop: buffered aggregation, in which no site waits for another.

Sites train without a break, each from the newest model when it begins. As soon as ``mode.buffer``
updates are in they make the next version of the model: each update's change joins it, the less of it
the more versions were made since the update began. ``versions`` holds what is durable of that.
"""

import asyncio
from collections.abc import Collection, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from fedloom_common.errors import TooFewUpdates
from fedloom_common.runspec import Async
from fedloom_server.central import Central
from fedloom_server.closing import measure_last
from fedloom_server.codecs import most_update_bytes
from fedloom_server.federation import Federation
from fedloom_server.folding import Folding, folds_early
from fedloom_server.idle import IdleSites
from fedloom_server.pending import Terms
from fedloom_server.records import Assignment, AssignmentState, Round, Run, Work
from fedloom_server.sites import LOOK_S
from fedloom_server.versions import ALL_MADE, Versions


async def run_buffered(run: Run, federation: Federation) -> str:
    """Buffered asynchronous aggregation: versions until a stop condition holds; returns which.

    Raises:
        TooFewSites: nobody works for it any more, and nobody is there who could.
        TooFewUpdates: all who are there have failed time and again.
        BadTensor: the updates make no finite model.
    Source: Nguyen et al. 2022, arXiv:2106.06639, algorithm 1, weighted by examples.
    """
    flow = _Flow(run, federation)
    try:
        await flow.take_up()
        while True:
            while (reason := flow.stop_reason()) is None:
                flow.give_work()
                await flow.until_something_happens()
                flow.make_versions()
            if await flow.conclude(reason):
                return reason
    finally:
        await flow.leave()


class _Flow:
    """What is under way of one run."""

    def __init__(self, run: Run, federation: Federation) -> None:
        self._run, self._spec, self._federation = run, run.spec, federation
        assert isinstance(self._spec.mode, Async)
        self._mode = self._spec.mode
        self._versions = Versions(
            run,
            self._mode,
            federation.store,
            federation.watching,
            federation.meters,
            keep_models=federation.keep_models,
        )
        self._idle = IdleSites(run, federation)
        self._work: dict[asyncio.Task[None], Assignment] = {}
        self._buffer: list[Assignment] = []
        """Updates for the version whose buffer is open, as they came."""
        self._folding: Folding | None = None
        """Folds the buffer; None until the model is made that the buffer is for."""
        self._taken: list[Assignment] = []
        """Updates of the version that is being made."""
        self._making: asyncio.Task[None] | None = None
        self._measuring: list[Assignment] | None = None
        self._changed = asyncio.Event()
        self._sites_watch = self._watch_sites()
        self._has_news = True
        self._central = Central(run, federation, on_end=self._hear_news)

    async def take_up(self) -> None:
        """Begin, or go on where a coordinator that was killed has stopped."""
        versions = self._versions
        live = versions.take_up()
        if versions.closed is not None:
            self._taken = [a for a in live if a.round == versions.closed.number]
            self._folding = self._new_folding(versions.closed)
            await self._folding.begin(self._taken)  # what a power cut has spoilt is open again
        came = [a for a in live if a not in self._taken and a.state is AssignmentState.DONE]
        self._buffer = sorted(came, key=lambda assignment: not assignment.is_folded)
        self._federation.assignments.uploads.stage(self._taken + self._buffer)
        still_open = [a for a in live if a.state is AssignmentState.OPEN]
        for assignment in still_open:
            self._begin(assignment)
        if versions.closed is None:
            await self._open_buffer()
        self._withdraw_stale(still_open)
        if versions.measured:
            self._measuring = versions.evaluations(()) or None  # all may have answered already
        self.make_versions()

    def stop_reason(self) -> str | None:
        """Why the run ends now, if it does."""
        has_news, self._has_news = self._has_news, False
        return self._versions.stop_reason() if has_news else None

    def give_work(self) -> None:
        """Ask idle sites: to measure a version if it is its turn, or to train from the newest."""
        versions, assignments = self._versions, self._work.values()
        sites = self._idle.fitting(has_begun=versions.has_begun)
        if versions.measured and self._measuring is None and (sites or versions.has_begun):
            self._measuring = versions.evaluations(sites) or None
        busy = {assignment.site for assignment in assignments}
        for assignment in self._measuring or ():
            if assignment.state is AssignmentState.OPEN and assignment.site not in busy:
                self._begin(assignment)
                busy.add(assignment.site)
        if self._making is not None:
            return  # a model that is being made is worth the seconds: training from the one before is stale
        if versions.open is not None:
            self._have_trained(sites, busy)
        self._idle.tell(is_busy=bool(self._work))

    def _have_trained(self, sites: Sequence[str], busy: Collection[str]) -> None:
        versions, assignments = self._versions, self._work.values()
        training = [a.site for a in assignments if a.work is Work.TRAIN]
        connected = sum(self._federation.sites.link(site) is not None for site in training)
        free = (self._mode.concurrency or len(sites)) - connected
        for site in self._idle.pick(sites, busy, free, versions):
            self._begin(versions.new_training(site))

    async def until_something_happens(self) -> None:
        """Wait until work has ended, a site has come or gone, a version is made or a rest is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._idle.rest_s()):  # wait_for may swallow a cancellation
                await self._changed.wait()
        self._changed.clear()
        if self._sites_watch.done():
            self._sites_watch = self._watch_sites()
        for task in [task for task in self._work if task.done()]:
            assignment = self._work.pop(task)
            task.result()
            self._idle.note(assignment)
        if self._making is not None and self._making.done():
            making, self._making = self._making, None
            making.result()
            self._has_news = True
            if not self._central.is_busy:  # one that takes longer than a version passes some over
                self._central.begin(self._run.rounds_done)

    def make_versions(self) -> None:
        """Close a full buffer and have its version made; end a measurement that everybody has answered."""
        versions = self._versions
        if versions.closed is None and self._folding and len(self._buffer) >= self._mode.buffer:
            self._close()
        if versions.closed is not None and self._making is None:
            number = versions.closed.number
            awaited = (a for a in self._work.values() if a.work is Work.TRAIN and a.round == number)
            if not any(awaited):  # only what a power cut has spoilt is, after a restart
                self._making = self._spawn(self._make())
        batch = self._measuring
        if batch is not None and all(a.state is not AssignmentState.OPEN for a in batch):
            versions.end_measurement(batch)
            self._measuring, self._has_news = None, True

    async def conclude(self, reason: str) -> bool:
        """End the run in good order: a version that is being made becomes the last, and is measured.

        Whether it has ended: it goes on if the last version turns out to be so good that it should.
        """
        if self._making is not None:
            await self._making
        trainings = [a for a in self._work.values() if a.work is Work.TRAIN]
        self._federation.assignments.cancel(trainings, f"the run ends: {reason}")
        await self._end_measurement_of_last()
        await measure_last(self._run, self._federation)
        await self._central.settled()
        self._central.begin(self._run.rounds_done, is_last=True)
        await self._central.settled()
        if self._versions.stop_reason() is None:
            return False
        self._versions.end(reason)
        return True

    async def _end_measurement_of_last(self) -> None:
        """Have the last version's measurement ended, if it is its turn; an older one's is left as it is."""
        if self._measuring is None and self._versions.measured:  # nobody has been asked yet
            self._measuring = self._versions.evaluations(self._idle.fitting(has_begun=True)) or None
        batch = self._measuring
        if batch is None or batch[0].round != self._run.rounds_done:
            return
        begun = self._work.values()
        for assignment in [a for a in batch if a.state is AssignmentState.OPEN and a not in begun]:
            self._begin(assignment)  # its site has just been training
        await asyncio.gather(*(task for task, assignment in self._work.items() if assignment in batch))
        self._versions.end_measurement(batch)
        self._measuring = None

    async def leave(self) -> None:
        """Let go of everything; what is open in the store stays so, to be taken up again."""
        await self._central.leave()
        for task in (*self._work, self._sites_watch):
            task.cancel()
        making = [self._making] if self._making else []  # its threads would go on, so it ends first
        await asyncio.gather(*self._work, self._sites_watch, *making, return_exceptions=True)
        if self._folding is not None:
            await self._folding.end()
        self._federation.assignments.uploads.release(self._taken + self._buffer)

    def _begin(self, assignment: Assignment) -> None:
        cohort, assignments = self._spec.cohort, self._federation.assignments
        model = self._federation.store.files.path(assignment.model_digest)
        is_measurement = assignment.work is Work.EVALUATE
        terms = Terms(
            needed=0, stall_s=cohort.stall_s,
            deadline_s=self._spec.evaluation.deadline_s if is_measurement else None,
            comes_first=assignment in self._taken or not self._folds_early(),
            most_update_bytes=most_update_bytes(self._spec.transport.up, model),
            counted=self._versions.counted if self._spec.leaves_at_sites else None,
        )  # fmt: skip

        def ended() -> None:
            self._came(assignment)

        work = self._spawn(assignments.see_through(self._run, [assignment], terms, ended))
        self._work[work] = assignment

    def _folds_early(self) -> bool:
        """Whether the buffer that is open makes room as it fills."""
        record = self._versions.open
        return record is None or folds_early(self._run, record, self._federation.store)

    def _came(self, assignment: Assignment) -> None:
        """An assignment has ended; its update, if it sent one, is in the buffer from this moment on."""
        is_update = assignment.work is Work.TRAIN and assignment.state is AssignmentState.DONE
        if is_update and assignment not in self._taken:
            self._buffer.append(assignment)
            self._versions.came(assignment)
        if self._folding is not None:
            self._folding.look()
        self._versions.tell_open()
        self._changed.set()

    def _hear_news(self) -> None:
        self._has_news = True
        self._changed.set()

    def _close(self) -> None:
        versions, needed = self._versions, self._mode.buffer
        still_open = (a for a in self._work.values() if a.state is AssignmentState.OPEN)
        training = [a for a in still_open if a.work is Work.TRAIN]
        self._taken, left = self._buffer[:needed], self._buffer[needed:]
        versions.close(self._taken, [*left, *training])
        self._buffer = left if versions.open else []
        if versions.open is None:
            self._federation.assignments.cancel(training, ALL_MADE)
            self._federation.assignments.uploads.release(left)
        self._withdraw_stale(training)

    def _withdraw_stale(self, training: list[Assignment]) -> None:
        most = self._mode.staleness.max
        for assignment in self._versions.too_stale(training):
            reason = f"its model is {assignment.staleness} versions old, mode.staleness.max is {most}"
            self._federation.assignments.cancel([assignment], reason)

    async def _make(self) -> None:
        assert self._folding is not None
        await self._folding.end()
        done = [a for a in self._taken if a.state is AssignmentState.DONE]
        if not done:
            raise TooFewUpdates("every update of the version was lost by a power cut")
        await self._versions.make(done, self._folding)
        self._federation.assignments.uploads.release(self._taken)
        self._taken, self._folding = [], None
        await self._open_buffer()

    async def _open_buffer(self) -> None:
        if self._versions.open is None:
            return
        folding, updates = self._new_folding(self._versions.open), self._buffer
        await folding.begin(updates, lambda: len(updates) < self._mode.buffer)
        for lost in [a for a in updates if a.state is AssignmentState.OPEN]:
            updates.remove(lost)
            self._federation.assignments.uploads.release([lost])
            self._begin(lost)
        self._folding = folding

    def _new_folding(self, record: Round) -> Folding:
        return Folding(self._run, record, self._federation.store, self._federation.assignments.uploads)

    def _watch_sites(self) -> asyncio.Task[None]:
        """From this moment on, so that no change is missed between two looks at the sites."""
        change = self._federation.sites.next_change()

        async def wait() -> None:
            await change.wait()
            await asyncio.sleep(LOOK_S)  # many that come at once are one change

        return self._spawn(wait())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._changed.set())
        return task
