"""What is durable of an asynchronous run: its versions, and the trainings that are to make the next one.

A version is a round's record. While its buffer is open (TRAINING), all trainings that are open, and
all updates that have come and were not taken, are of that round. When it closes (AGGREGATING) it keeps
the updates that it takes, and one transaction moves the rest to the next version, whose buffer opens
at once: they are then one version more behind. So the records tell at any moment which update counts
where, and a coordinator that was killed goes on from them. A version whose updates make no model is lost
(FAILED) with the one whose buffer is open: its own buffer opens again first.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Sequence

from fedloom_common.runspec import Async
from fedloom_common.runspec.evaluation import TRAIN_PREFIX
from fedloom_server.config import KeepModels
from fedloom_server.evaluation import combined
from fedloom_server.failures import FAILURES_KEPT
from fedloom_server.folding import Folding
from fedloom_server.measuring import initial_round, is_measured_by_trainings, is_measured_now, told_by
from fedloom_server.meters import Meters
from fedloom_server.records import Assignment, AssignmentState, Round, RoundState, Run, Work, assignment_id
from fedloom_server.retention import drop_old_models
from fedloom_server.stopping import stop_reason
from fedloom_server.store import Store
from fedloom_server.watching import RoundChange, Watching

ALL_MADE = "the run's last version has its updates"

logger = logging.getLogger(__name__)


class Versions:
    """The versions of one run's model."""

    def __init__(
        self,
        run: Run,
        mode: Async,
        store: Store,
        watching: Watching,
        meters: Meters,
        *,
        keep_models: KeepModels,
    ) -> None:
        self._run, self._spec, self._mode = run, run.spec, mode
        self._store, self._watching, self._keep_models = store, watching, keep_models
        self._meters = meters
        self.open: Round | None = None
        """The version that updates join now; None once the last one is closed."""
        self.closed: Round | None = None
        """The version that is being made."""
        self.measured: list[Round] = []
        """Versions to be measured, one after the other; the first is under way."""
        self.turns: defaultdict[str, int] = defaultdict(int)
        """How often each site was asked to train."""
        self.counted: dict[str, int] = {}
        """The turn of each site's last update that counts, or is still to."""
        self._last_measured: dict[str, int] = {}
        """The version that each site was last asked to measure before it trains."""
        self.examples: dict[str, int] = {}
        """nₖ of each site's latest training."""

    def take_up(self) -> list[Assignment]:
        """Begin the run, or go on where the records say; gives the trainings that still matter."""
        records = self._store.rounds(self._run.id) or self._first()
        self.open = _one(records, RoundState.TRAINING)
        self.closed = _one(records, RoundState.AGGREGATING)
        self.measured = [record for record in records if record.state is RoundState.EVALUATING]
        attempts = {r.number: r.attempt for r in records if r.state is not RoundState.FAILED}
        unmade = [record.number for record in (self.open, self.closed) if record]
        present = []
        for assignment in self._store.assignments(self._run.id):
            if assignment.turn > self.turns[assignment.site]:
                self.turns[assignment.site] = assignment.turn
                self.examples[assignment.site] = assignment.examples
            if attempts.get(assignment.round) == assignment.attempt and _is_live(assignment):
                present.append(assignment)
        for assignment in present:
            if assignment.state is AssignmentState.DONE:
                self.came(assignment)
        return [assignment for assignment in present if assignment.round in unmade]

    def came(self, assignment: Assignment) -> None:
        """A training's update is here: it counts in this version or a later one."""
        known = self.counted.get(assignment.site, 0)
        self.counted[assignment.site] = max(known, assignment.turn)

    @property
    def has_begun(self) -> bool:
        """Whether a site was ever asked for anything."""
        return self.trainings > 0 or self._run.rounds_done > 0

    def stop_reason(self) -> str | None:
        """Why the run ends now, if it does."""
        history = self._store.history(self._run.id)
        elapsed_s = time.time() - self._run.started_at_s - self._run.paused_s
        return stop_reason(self._spec, history, elapsed_s)

    @property
    def trainings(self) -> int:
        """How often sites were asked to train, in all."""
        return sum(self.turns.values())

    def new_training(self, site: str) -> Assignment:
        """Have a site train from the newest version."""
        run, record = self._run, self.open
        assert record is not None, "nothing is trained after the last version"
        self.turns[site] += 1
        assignment = Assignment(
            id=assignment_id(run.id, self.turns[site], 1, Work.TRAIN, site), run_id=run.id,
            round=record.number, attempt=record.attempt, turn=self.turns[site],
            staleness=record.number - 1 - run.rounds_done, work=Work.TRAIN, site=site,
            model_digest=run.model_digest, model_bytes=run.model_bytes, measures=self._is_to_measure(site),
        )  # fmt: skip
        self._store.save(assignment)
        self._tell(record)
        return assignment

    def _is_to_measure(self, site: str) -> bool:
        """Whether a site measures the newest version before it trains: it need not do so twice."""
        number = self._run.rounds_done
        if self._last_measured.get(site) == number:
            return False
        self._last_measured[site] = number
        return is_measured_by_trainings(self._run, number, self._store)

    def close(self, taken: Sequence[Assignment], others: Sequence[Assignment]) -> None:
        """Make a version of these updates; the other trainings are for the next one, if there is any."""
        record = self.open
        assert record is not None
        assert self.closed is None
        record.state, record.cohort = RoundState.AGGREGATING, sorted({a.site for a in taken})
        self.examples |= {assignment.site: assignment.examples for assignment in taken}
        self.closed, self.open = record, None
        if record.number < self._spec.rounds:
            self.open = self._new(record.number + 1, RoundState.TRAINING)
        for assignment in others:
            if self.open is None:
                assignment.state, assignment.reason = AssignmentState.CANCELLED, ALL_MADE
            else:
                assignment.round, assignment.attempt = self.open.number, self.open.attempt
                assignment.staleness += 1
        self._store.save(record, *([self.open] if self.open else []), *others)
        for told in (record, self.open):
            self._tell(told)

    def tell_open(self) -> None:
        """Show how far the version has come whose buffer is open."""
        self._tell(self.open)

    def too_stale(self, trainings: Sequence[Assignment]) -> list[Assignment]:
        """Those from which no update can count any more."""
        return [a for a in trainings if a.staleness > self._mode.staleness.max]

    async def make(self, taken: Sequence[Assignment], folding: Folding) -> None:
        """Make the closed version's model, durable under its digest, named by round and run."""
        run, record = self._run, self.closed
        assert record is not None
        published = await folding.aggregate(taken)
        model, record.optimizer_digest = published.model, published.optimizer_digest
        record.metrics = _training_metrics(taken)
        record.model_digest, record.model_bytes, record.reason = model.digest, model.size_bytes, ""
        run.model_digest, run.model_bytes, run.rounds_done = model.digest, model.size_bytes, record.number
        if self._is_due(record.number):
            record.state = RoundState.EVALUATING
            self.measured.append(record)
        else:
            record.state, record.ended_at_s = RoundState.FINISHED, time.time()
        self.closed = None
        following = [self.open] if self.open else []
        for known in following:
            known.base_digest = model.digest
        measured = told_by(run, taken, self._store)
        self._store.save(run, record, *following, *measured)
        for earlier in measured:
            self._tell(earlier)
        if record.state is RoundState.FINISHED:
            self._meters.round_ended(record)
        self._watching.tell(run.id, run)
        self._tell(record)
        self._store.trim_failures(run.id, FAILURES_KEPT)
        self._store.clear_spool(run.id)
        drop_old_models(self._store, run, self._keep_models)
        facts = {name: round(value, 4) for name, value in record.metrics.items()}
        logger.info("version made", extra={"run": run.id, "round": record.number, "metrics": facts})

    def evaluations(self, sites: Sequence[str]) -> list[Assignment]:
        """What the version under measurement asks of sites; of ``sites``, if it has not asked yet.

        Nothing while it has asked nobody, and nobody is there.
        """
        run, record = self._run, self.measured[0]
        stored = self._asked_to_measure(record)
        if stored or not sites:
            return stored
        batch = [
            Assignment(
                id=assignment_id(run.id, record.number, record.attempt, Work.EVALUATE, site), run_id=run.id,
                round=record.number, attempt=record.attempt, work=Work.EVALUATE, site=site,
                model_digest=record.model_digest, model_bytes=record.model_bytes,
            )
            for site in sites
        ]  # fmt: skip
        self._store.save(*batch)
        self._tell(record)
        return batch

    def end_measurement(self, batch: Sequence[Assignment]) -> None:
        """Every site that was asked has answered, or never will."""
        record = self.measured.pop(0)
        self._finish(record, batch)
        self._store.save(record)
        self._meters.round_ended(record)
        self._tell(record)

    def end(self, reason: str) -> None:
        """The run ends: of the version whose buffer is open nothing will come.

        What sites have measured counts if nobody still measures: a part of them would compare with nothing.
        """
        for record in self.measured:
            batch = self._asked_to_measure(record)
            is_whole = all(assignment.state is not AssignmentState.OPEN for assignment in batch)
            self._finish(record, batch if is_whole else [])
        if self.open is not None:
            self.open.state, self.open.ended_at_s = RoundState.FAILED, time.time()
            self.open.reason = f"the run ended before the buffer was full: {reason}"
        ended = [*self.measured, *([self.open] if self.open else [])]
        self._store.save(*ended)
        for record in ended:
            self._meters.round_ended(record)
            self._tell(record)

    def _asked_to_measure(self, record: Round) -> list[Assignment]:
        return [
            assignment
            for assignment in self._store.assignments(self._run.id, record.number)
            if assignment.work is Work.EVALUATE
            and assignment.attempt == record.attempt
            and assignment.site not in self._spec.evaluation.central
        ]

    def _finish(self, record: Round, batch: Sequence[Assignment]) -> None:
        """End a version's record, with what these have measured and what a central site has told already."""
        done = [assignment for assignment in batch if assignment.state is AssignmentState.DONE]
        known = self._store.round(record.run_id, record.number) or record
        record.metrics = known.metrics | (combined(done) if done else {})
        if not done:
            logger.warning("no site evaluated the model", extra={"run": self._run.id, "round": record.number})
        record.state, record.ended_at_s = RoundState.FINISHED, time.time()

    def _first(self) -> list[Round]:
        records = [self._new(1, RoundState.TRAINING)]
        records[0].base_digest = self._run.model_digest
        if self._spec.evaluation.initial:
            records.insert(0, initial_round(self._run))
        self._store.save(*records)
        for record in records:
            self._tell(record)
        return records

    def _new(self, number: int, state: RoundState) -> Round:
        """A version, or the next attempt at one that was lost before the version under it was made."""
        lost = self._store.round(self._run.id, number)
        attempt = lost.attempt + 1 if lost else 1
        return Round(
            run_id=self._run.id, number=number, state=state, base_digest="", started_at_s=time.time(),
            attempt=attempt, first_attempt=attempt,
        )  # fmt: skip

    def _is_due(self, number: int) -> bool:
        """Whether sites are asked to measure a version: only one at a time is, besides the last."""
        is_last = number == self._spec.rounds
        return is_measured_now(self._spec, number) and (is_last or not self.measured)

    def _tell(self, record: Round | None) -> None:
        if record is not None and self._watching.is_watched(self._run.id):
            assignments = self._store.assignments(self._run.id, record.number)
            self._watching.tell(self._run.id, RoundChange(record, assignments))


def _one(records: Sequence[Round], state: RoundState) -> Round | None:
    found = [record for record in records if record.state is state]
    assert len(found) <= 1, f"{len(found)} versions are {state}"
    return found[0] if found else None


def _is_live(assignment: Assignment) -> bool:
    return assignment.work is Work.TRAIN and assignment.state in (AssignmentState.OPEN, AssignmentState.DONE)


def _training_metrics(taken: Sequence[Assignment]) -> dict[str, float]:
    metrics = {TRAIN_PREFIX + name: value for name, value in combined(taken).items()}
    return metrics | {TRAIN_PREFIX + "staleness": sum(a.staleness for a in taken) / len(taken)}
