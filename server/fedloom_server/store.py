"""The coordinator's durable state: records in a database, and the files beside it."""

import secrets
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    and_,
    case,
    cast,
    delete,
    func,
    literal,
    or_,
    select,
    tuple_,
)

from fedloom_common.errors import NotFound, WrongState
from fedloom_server.audit import AuditLog
from fedloom_server.database import Database, open_database
from fedloom_server.federationrecords import MetricPoint, SiteRecord
from fedloom_server.files import Files
from fedloom_server.objects import Objects
from fedloom_server.records import (
    Assignment,
    AssignmentState,
    Base,
    Failure,
    Round,
    RoundState,
    Run,
    RunState,
    Work,
)
from fedloom_server.schema import upgrade
from fedloom_server.spool import Spool
from fedloom_server.stopping import RoundResult
from fedloom_server.writing import write

MOST_ATTEMPTS = 1 << 20  # of a round, when rounds and attempts are put in one order

_OF_LAST_ATTEMPT = and_(
    Round.run_id == Assignment.run_id,
    Round.number == Assignment.round,
    Round.attempt == Assignment.attempt,
)
"""Joins assignments with their round, those of failed attempts left out."""

Row = TypeVar("Row", bound=Base)


class Store:
    """Runs, rounds and assignments. Calls are short transactions of a few milliseconds.

    Every call may raise StorageUnavailable or StorageFull.
    """

    def __init__(
        self,
        folder: Path,
        database: Database | None = None,
        *,
        objects: Objects | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.database = database or open_database(None, folder)
        upgrade(self.database)
        self.files = Files(folder / "files", objects, cache_bytes)
        self.spool = Spool(folder)
        self.audit_log = AuditLog(self.database)

    def close(self) -> None:
        """Let the database go."""
        self.files.close()
        self.database.close()

    def save(self, *records: Base) -> None:
        """Write records, new or changed, whole and in one transaction."""
        self.database.do(lambda session: write(session, records))

    def run(self, prefix: str) -> Run:
        """The run whose id begins so.

        Raises:
            NotFound: none does.
            WrongState: several do.
        """
        found = self._all(select(Run).where(Run.id.startswith(prefix, autoescape=True)).limit(2))
        if not prefix or not found:
            raise NotFound(f"there is no run {prefix!r}; `fedloom run list` names them")
        if len(found) > 1:
            raise WrongState(
                f"several runs begin with {prefix!r}: {found[0].id}, {found[1].id}; give more of the id"
            )
        return found[0]

    def runs(self, *states: RunState) -> list[Run]:
        """Runs, oldest first; all, or those in the given states."""
        query = select(Run).order_by(Run.submitted_at_s, Run.id)
        return self._all(query.where(Run.state.in_(states)) if states else query)

    def count_runs(self) -> dict[RunState, int]:
        """How many runs are in each state; those in none are left out."""
        query = select(Run.state, func.count()).group_by(Run.state)
        rows = self.database.do(lambda session: session.execute(query).all())
        return {state: count for state, count in rows}  # noqa: C416 (a row is no pair to mypy)

    def require_answer(self) -> None:
        """Ask the database something that takes no time.

        Raises:
            StorageUnavailable: it does not answer.
        """
        self.database.do(lambda session: session.execute(select(literal(1))).one())

    def rounds(self, run_id: str) -> list[Round]:
        """A run's rounds, first to last."""
        return self._all(select(Round).where(Round.run_id == run_id).order_by(Round.number))

    def round(self, run_id: str, number: int) -> Round | None:
        """One round of a run; None if it has none of that number."""
        return self.database.do(lambda session: session.get(Round, (run_id, number)))

    def unfinished_rounds(self, run_id: str) -> list[Round]:
        """A run's rounds that have yet to end, first to last."""
        ends = (RoundState.FINISHED, RoundState.FAILED)
        query = select(Round).where(Round.run_id == run_id, Round.state.not_in(ends))
        return self._all(query.order_by(Round.number))

    def history(self, run_id: str) -> list[RoundResult]:
        """What came of a run's finished rounds, first to last; read after each, so without cohorts."""
        query = select(Round.number, Round.metrics).order_by(Round.number)
        query = query.where(Round.run_id == run_id, Round.state == RoundState.FINISHED)
        rows = self.database.do(lambda session: session.execute(query).all())
        return [RoundResult(number=number, metrics=metrics) for number, metrics in rows]

    def assignments(self, run_id: str, round_number: int | None = None) -> list[Assignment]:
        """Assignments of a run, or of one of its rounds, every attempt of them."""
        query = select(Assignment).where(Assignment.run_id == run_id)
        if round_number is not None:
            query = query.where(Assignment.round == round_number)
        return self._all(query.order_by(Assignment.round, Assignment.attempt, Assignment.site))

    def assignments_between(self, run_id: str, first: int, last: int) -> list[Assignment]:
        """A run's assignments of the rounds from ``first`` to ``last``, as ``assignments`` gives them."""
        query = select(Assignment).where(Assignment.run_id == run_id, Assignment.round.between(first, last))
        return self._all(query.order_by(Assignment.round, Assignment.attempt, Assignment.site))

    def assignment(self, assignment_id: str) -> Assignment | None:
        """One assignment; None if there is none of that id."""
        return self.database.do(lambda session: session.get(Assignment, assignment_id))

    def measured_first(self, run_id: str, round_number: int) -> list[Assignment]:
        """Finished trainings, of failed attempts too, that measured a round's model first; by attempt."""
        query = select(Assignment).where(Assignment.run_id == run_id, Assignment.measures)
        query = query.where(Assignment.work == Work.TRAIN, Assignment.state == AssignmentState.DONE)
        query = query.where(Assignment.round - Assignment.staleness == round_number + 1)
        return self._all(query.order_by(Assignment.round, Assignment.attempt, Assignment.site))

    def training_history(self, run_id: str, before: tuple[int, int]) -> list[tuple[str, int, int]]:
        """Of each site that a run has asked to train before a round's attempt: when last, and its examples.

        "When" is a number that grows with round and attempt; the examples are the most that ever counted.
        """
        when = cast(Assignment.round, BigInteger) * MOST_ATTEMPTS + Assignment.attempt
        examples = case((Assignment.state == AssignmentState.DONE, Assignment.examples), else_=0)
        query = (
            select(Assignment.site, func.max(when), func.max(examples))
            .where(Assignment.run_id == run_id, Assignment.work == Work.TRAIN)
            .where(tuple_(Assignment.round, Assignment.attempt) < before)
            .group_by(Assignment.site)
        )
        return self.database.do(lambda session: [tuple(row) for row in session.execute(query)])

    def update_norms(self, run_id: str, first: int, end: int) -> list[float]:
        """Norms of the updates that counted in a run's rounds from ``first`` on, before ``end``."""
        query = select(Assignment.update_norm).join(Round, _OF_LAST_ATTEMPT).where(_brought(run_id))
        query = query.where(Assignment.round >= first, Assignment.round < end, Assignment.update_norm > 0)
        return self.database.do(lambda session: list(session.scalars(query)))

    def counted_rounds(self, run_id: str, sites: Collection[str]) -> dict[str, int]:
        """Of each of these sites its last round whose update counts in a synchronous run, or is still to.

        Rounds are as the sites know them: those from whose base model they trained.
        """
        query = select(Assignment.site, func.max(Assignment.round - Assignment.staleness))
        query = query.join(Round, _OF_LAST_ATTEMPT).where(_brought(run_id), Assignment.site.in_(sites))
        rows = self.database.do(lambda session: session.execute(query.group_by(Assignment.site)).all())
        return {site: number for site, number in rows}  # noqa: C416 (a row is no pair to mypy)

    def open_assignments(self) -> list[Assignment]:
        """Assignments of every run that have not ended."""
        return self._all(select(Assignment).where(Assignment.state == AssignmentState.OPEN))

    def sites(self) -> list[SiteRecord]:
        """Every site that is known."""
        return self._all(select(SiteRecord))

    def remove_site(self, name: str) -> None:
        """Forget a site; what it did stays with its runs."""
        self.database.do(lambda session: session.execute(delete(SiteRecord).where(SiteRecord.name == name)))

    def unsettled(self, run_id: str) -> list[Assignment]:
        """A run's assignments that are open, or late and not yet taken by a round."""
        query = select(Assignment).where(Assignment.run_id == run_id)
        return self._all(query.where(or_(Assignment.state == AssignmentState.OPEN, Assignment.is_late)))

    def late(self, run_id: str) -> list[Assignment]:
        """Trainings whose round went on without them and that no later one has taken yet, oldest first."""
        alive = Assignment.state.in_((AssignmentState.OPEN, AssignmentState.DONE))
        query = select(Assignment).where(Assignment.run_id == run_id, alive)
        query = query.where(Assignment.is_late)
        return self._all(query.order_by(Assignment.round, Assignment.attempt, Assignment.site))

    def failures(self, run_id: str) -> list[Failure]:
        """What went wrong in a run, first to last."""
        return self._all(select(Failure).where(Failure.run_id == run_id).order_by(Failure.at_s, Failure.id))

    def trim_failures(self, run_id: str, keep: int) -> None:
        """Keep only the newest failures of a run."""
        newest = select(Failure.id).where(Failure.run_id == run_id)
        newest = newest.order_by(Failure.at_s.desc(), Failure.id.desc()).limit(keep)
        old = delete(Failure).where(Failure.run_id == run_id, Failure.id.not_in(newest))
        self.database.do(lambda session: session.execute(old))

    def add(self, *records: Base) -> None:
        """Write new records whose keys the database draws; at worst twice, if its answer is lost."""
        self.database.do(lambda session: session.add_all(records))

    def metric_points(self, run_id: str) -> list[MetricPoint]:
        """Samples of a run's training, as they came."""
        return self._all(select(MetricPoint).where(MetricPoint.run_id == run_id).order_by(MetricPoint.id))

    def clear_spool(self, run_id: str = "") -> None:
        """Remove spooled files, all or a run's, that no round's present attempt and no later one counts on.

        Nothing may be writing files of that run.
        """
        unfinished = select(Round).where(Round.state.in_((RoundState.TRAINING, RoundState.AGGREGATING)))
        late = select(Assignment).where(Assignment.is_late)
        if run_id:
            unfinished = unfinished.where(Round.run_id == run_id)
            late = late.where(Assignment.run_id == run_id)
        rounds, counted = self._all(unfinished), self._all(late)
        for record in rounds:
            present = self.assignments(record.run_id, record.number)
            counted += [assignment for assignment in present if assignment.attempt == record.attempt]
        wanted = [
            self.spool.update_path(assignment)
            for assignment in counted
            if assignment.state in (AssignmentState.OPEN, AssignmentState.DONE) and not assignment.is_folded
        ]
        wanted += [self.spool.sum_path(item.run_id, item.sum_digest) for item in rounds if item.sum_digest]
        self.spool.keep_only(wanted, run_id)

    def _all(self, query: Select[Row]) -> list[Row]:
        return self.database.do(lambda session: list(session.scalars(query)))


def _brought(run_id: str) -> ColumnElement[bool]:
    """Trainings of a run whose update has come."""
    is_done = Assignment.state == AssignmentState.DONE
    return and_(Assignment.run_id == run_id, Assignment.work == Work.TRAIN, is_done)


def new_run_id() -> str:
    """A short random name."""
    return secrets.token_hex(6)
