"""The coordinator's durable state: records in a database, files by digest beside it.

A file is on disk under its final name before the row that names it is
committed, so a row never names a file that is not there.
"""

import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Select, create_engine, event, inspect, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import sessionmaker

from fedloom_common.digests import DIGEST, digest_of_file, is_digest, plain_name
from fedloom_common.errors import NotFound, StorageFull, WrongState
from fedloom_common.files import sync_file, sync_folder
from fedloom_common.partial import overwrite
from fedloom_common.spares import Spares
from fedloom_server.audit import AuditLog
from fedloom_server.records import Assignment, AssignmentState, Base, Round, RoundState, Run, RunState, Work

UPDATE_SUFFIX = ".safetensors"
SPARE_UPDATES = 4
SCHEMA_VERSION = 3  # raise it with every change of the tables

Row = TypeVar("Row", bound=Base)


@dataclass(frozen=True)
class StoredFile:
    """A file in the store."""

    digest: str
    size_bytes: int


class Files:
    """Immutable files, named by their digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, path: Path) -> StoredFile:
        """Take a file into the store, by rename; the same content twice is one file.

        It is synced first: initial models and assets are written by a process that does not.
        """
        stored = StoredFile(digest_of_file(path), path.stat().st_size)
        sync_file(path)
        path.replace(self._place(stored.digest))
        sync_folder(self._folder)
        return stored

    def path(self, digest: str) -> Path:
        """Where a file lies.

        Raises:
            NotFound: the digest is not one, or no such file is kept.
        """
        place = self._place(digest)
        if not place.is_file():
            raise NotFound(f"the coordinator does not keep {digest}")
        return place

    def remove(self, digests: Iterable[str]) -> None:
        """Remove files; those that are not there are no error."""
        for digest in digests:
            self._place(digest).unlink(missing_ok=True)

    def _place(self, digest: str) -> Path:
        if not is_digest(digest):
            raise NotFound(f"not a digest: {digest[:100]!r}; wanted {DIGEST}")
        return self._folder / plain_name(digest)


class Store:
    """Runs, rounds and assignments. Calls are short transactions of a few milliseconds."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files = Files(folder / "files")
        self.spool = folder / "spool"
        self.spool.mkdir(exist_ok=True)
        self.spares = Spares(folder / "spares", most=SPARE_UPDATES)
        """Updates that are folded: others arrive in their place."""
        self._residuals = folder / "residuals"
        self.workshop = folder / "workshop"
        """Initial models in the making; what a killed coordinator left of them is of no use."""
        shutil.rmtree(self.workshop, ignore_errors=True)
        self.workshop.mkdir()
        engine = create_engine(f"sqlite:///{folder / 'coordinator.db'}")
        event.listen(engine, "connect", _make_durable)
        self._engine = engine
        self._prepare_tables()
        self._sessions = sessionmaker(engine, expire_on_commit=False)
        self.audit_log = AuditLog(self._sessions)

    def close(self) -> None:
        """Let the database go."""
        self._engine.dispose()

    def _prepare_tables(self) -> None:
        """Make the tables of a new database.

        Raises:
            WrongState: the database is of another release.
        """
        with self._engine.begin() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            is_new = not inspect(connection).get_table_names()
            if not is_new and version != SCHEMA_VERSION:
                raise WrongState(
                    f"{self.spool.parent} has tables of version {version}, this release of fedloom needs "
                    f"{SCHEMA_VERSION}: start the release that made them, or give another state_dir"
                )
            Base.metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def save(self, *records: Base) -> None:
        """Write records, new or changed, in one transaction."""
        try:
            with self._sessions.begin() as session:
                for record in records:
                    session.merge(record)
        except OperationalError as error:
            if "full" not in str(error.orig):
                raise
            raise StorageFull(f"no space left for the database in {self.spool.parent}: free some") from error

    def run(self, prefix: str) -> Run:
        """The run whose id begins so.

        Raises:
            NotFound: none does.
            WrongState: several do.
        """
        with self._sessions() as session:
            found = session.scalars(
                select(Run).where(Run.id.startswith(prefix, autoescape=True)).limit(2)
            ).all()
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

    def rounds(self, run_id: str) -> list[Round]:
        """A run's rounds, first to last."""
        return self._all(select(Round).where(Round.run_id == run_id).order_by(Round.number))

    def assignments(self, run_id: str, round_number: int | None = None) -> list[Assignment]:
        """Assignments of a run, or of one of its rounds, every attempt of them."""
        query = select(Assignment).where(Assignment.run_id == run_id)
        if round_number is not None:
            query = query.where(Assignment.round == round_number)
        return self._all(query.order_by(Assignment.round, Assignment.attempt, Assignment.site))

    def assignment(self, assignment_id: str) -> Assignment | None:
        """One assignment; None if there is none of that id."""
        with self._sessions() as session:
            return session.get(Assignment, assignment_id)

    def close_rounds(self, run: Run) -> list[Round]:
        """The unfinished round of a run that ends early, closed: training is lost, later steps can go on."""
        unfinished = [record for record in self.rounds(run.id) if record.state is not RoundState.FINISHED]
        for record in unfinished:
            record.ended_at_s = run.ended_at_s
            if record.state is RoundState.TRAINING:
                record.state, record.reason = RoundState.FAILED, f"the run was {run.state}"
        return unfinished

    def begin_again(self, run: Run) -> None:
        """Save a run that is taken up after its end: training begins a new attempt, later steps go on."""
        changed: list[Base] = [run]
        for record in self.rounds(run.id):
            if record.state is not RoundState.FINISHED:
                record.ended_at_s = 0.0
                changed.append(record)
            if record.state in (RoundState.TRAINING, RoundState.FAILED):
                record.state, record.cohort = RoundState.TRAINING, []
                record.attempt = record.first_attempt = record.attempt + 1
                record.sum_digest = ""
            if record.state is RoundState.EVALUATING:
                cancelled = [
                    assignment
                    for assignment in self.assignments(run.id, record.number)
                    if assignment.work is Work.EVALUATE and assignment.state is AssignmentState.CANCELLED
                ]
                for assignment in cancelled:
                    assignment.state, assignment.reason = AssignmentState.OPEN, ""
                changed += cancelled
        self.save(*changed)

    def finished_rounds(self, run_id: str) -> list[Round]:
        """A run's rounds whose model is durable and evaluated, first to last."""
        return [record for record in self.rounds(run_id) if record.state is RoundState.FINISHED]

    def update_path(self, assignment: Assignment) -> Path:
        """Where an assignment's update is spooled."""
        return self.spool / f"{assignment.id}{UPDATE_SUFFIX}"

    def place_for(self, assignment: Assignment) -> Path:
        """Where an assignment's update is to arrive, over a spare if nothing of it is there."""
        path = self.update_path(assignment)
        if not path.exists() and (spare := self.spares.take()):
            overwrite(spare, path)
        return path

    def sum_path(self, digest: str) -> Path:
        """Where the sum of a round's folded updates lies."""
        return self.spool / f"{plain_name(digest)}.sum"

    def residual_folder(self, run_id: str) -> Path:
        """Where a run keeps what its way down has left out so far."""
        return self._residuals / run_id

    def clear_spool(self) -> None:
        """Remove spooled files that no unfinished round's present attempt counts on."""
        unfinished = select(Round).where(Round.state.in_((RoundState.TRAINING, RoundState.AGGREGATING)))
        counted = (AssignmentState.OPEN, AssignmentState.DONE)
        with self._sessions() as session:
            rounds = session.scalars(unfinished).all()
        wanted = {
            self.update_path(assignment).name
            for record in rounds
            for assignment in self.assignments(record.run_id, record.number)
            if assignment.attempt == record.attempt
            and assignment.state in counted
            and not assignment.is_folded
        }
        wanted |= {self.sum_path(record.sum_digest).name for record in rounds if record.sum_digest}
        for path in self.spool.iterdir():
            if path.suffix == UPDATE_SUFFIX and path.name not in wanted:
                self.spares.keep(path)
        for path in self.spool.iterdir():
            if path.name not in wanted and path.name.removeprefix(".").removesuffix(".held") not in wanted:
                path.unlink()

    def drop_old_models(self, run: Run, keep: int) -> None:
        """Remove a run's models older than its latest ``keep``, each with the change that told it."""
        mine = [record for record in self.rounds(run.id) if record.model_digest]
        old = {name for record in mine[:-keep] for name in _files_of(record)}
        old -= {name for record in mine[-keep:] for name in _files_of(record)}
        with self._sessions() as session:
            for column in (Round.model_digest, Round.delta_digest):
                elsewhere = select(column).where(Round.run_id != run.id, column.in_(old))
                old -= set(session.scalars(elsewhere))
            old -= set(session.scalars(select(Run.model_digest).where(Run.model_digest.in_(old))))
        self.files.remove(old)

    def _all(self, query: Select[Row]) -> list[Row]:
        with self._sessions() as session:
            return list(session.scalars(query))


def _files_of(record: Round) -> set[str]:
    return {record.model_digest, record.delta_digest} - {""}


def new_run_id() -> str:
    """A short random name."""
    return secrets.token_hex(6)


def _make_durable(connection: Any, _: Any) -> None:
    """WAL lets readers go on while a writer writes; FULL makes each commit survive a power cut."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")
