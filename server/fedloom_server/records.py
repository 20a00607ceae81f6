"""What the coordinator remembers of runs: rounds, assignments and failures, as rows of its database.

The rows are the domain's own objects; rules and edges pass them around. Only
``store`` opens sessions on them.
"""

from enum import StrEnum
from functools import lru_cache
from typing import Any

from sqlalchemy import JSON, BigInteger, Double, Enum, ForeignKeyConstraint, Index, MetaData, text
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from fedloom_common.runspec import RunSpec
from fedloom_server.columns import Characters, Numbers

SPECS_KEPT = 64  # parsed: rules ask for a run's spec many times for each site


class RunState(StrEnum):
    """The life of a run; docs/operations/runs.md draws it."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    PAUSED = "paused"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_end(self) -> bool:
        """Whether nothing more happens unless an operator resumes the run."""
        return self in (RunState.FINISHED, RunState.FAILED, RunState.STOPPED)

    @property
    def goes_on_by_itself(self) -> bool:
        """Whether nobody needs to do anything for the run to go on."""
        return self in (RunState.QUEUED, RunState.RUNNING, RunState.WAITING)


class RoundState(StrEnum):
    """The life of a round."""

    TRAINING = "training"
    AGGREGATING = "aggregating"
    EVALUATING = "evaluating"
    FINISHED = "finished"
    FAILED = "failed"


class Work(StrEnum):
    """What an assignment asks for."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    ALONE = "alone"
    """Train by itself, to compare with."""


class AssignmentState(StrEnum):
    """The life of an assignment; every end but DONE has a reason."""

    OPEN = "open"
    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"
    REJECTED = "rejected"
    LOST = "lost"
    CANCELLED = "cancelled"


class Base(MappedAsDataclass, DeclarativeBase, kw_only=True):
    """Base of all rows."""

    metadata = MetaData()
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads it from the class)
        str: Characters(),
        StrEnum: Enum(StrEnum, native_enum=False, length=16),  # new members need no migration
        float: Double(),
        dict[str, Any]: JSON,
        dict[str, float]: Numbers(),
        dict[str, str]: JSON,
        dict[str, int]: JSON,
        dict[str, list[int]]: JSON,
        list[str]: JSON,
        list[dict[str, Any]]: JSON,
    }


class Run(Base):
    """One training of one model over many rounds."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    spec_json: Mapped[str]
    state: Mapped[RunState]
    submitted_at_s: Mapped[float]
    assets: Mapped[list[dict[str, Any]]]
    """Files besides the weights that make the model: name, digest, size_bytes of each."""
    model_digest: Mapped[str]
    """The latest global model."""
    model_bytes: Mapped[int] = mapped_column(BigInteger)
    optimizer_digest: Mapped[str] = mapped_column(default="")
    """State of the server optimizer that round 1 begins with, of a clone; empty for a new one."""
    reason: Mapped[str] = mapped_column(default="")
    started_at_s: Mapped[float] = mapped_column(default=0.0)
    ended_at_s: Mapped[float] = mapped_column(default=0.0)
    paused_s: Mapped[float] = mapped_column(default=0.0)
    """Time between an end or a pause and an operator's resume, which does not count for stop.wall_s."""
    paused_at_s: Mapped[float] = mapped_column(default=0.0)
    """When it was paused; 0 while it is not."""
    rounds_done: Mapped[int] = mapped_column(default=0)
    priority: Mapped[int] = mapped_column(default=0)
    """Runs of a higher one begin first."""
    cloned_from: Mapped[str] = mapped_column(default="")
    """Id of the run whose spec, changed or not, this one began with."""
    cloned_round: Mapped[int | None] = mapped_column(default=None)
    """The round of that run whose model this one began with; None if it began with a model of its own."""
    adapter: Mapped[dict[str, Any]] = mapped_column(default_factory=dict)
    """What made the first model where only an adapter is trained: ``adapters.parts.Parts``; else nothing."""

    @property
    def spec(self) -> RunSpec:
        """What the operator asked for."""
        return _spec_of(self.spec_json)


class Round(Base):
    """One exchange with a cohort; number 0 is the evaluation of the initial model."""

    __tablename__ = "rounds"
    __table_args__ = (ForeignKeyConstraint(["run_id"], ["runs.id"]),)

    run_id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[RoundState]
    base_digest: Mapped[str]
    """The model that the sites start from."""
    started_at_s: Mapped[float]
    attempt: Mapped[int] = mapped_column(default=1)
    first_attempt: Mapped[int] = mapped_column(default=1)
    """Where counting began when the run last went on after it had ended or waited."""
    cohort: Mapped[list[str]] = mapped_column(default_factory=list)
    asked_at_s: Mapped[float] = mapped_column(default=0.0)
    """When its sites were given the work under way, in seconds since 1970; its deadline counts from then."""
    target: Mapped[int] = mapped_column(default=0)
    """Updates with which the round goes on, whoever is still at work; 0 if it goes on when all have ended."""
    population: Mapped[int] = mapped_column(default=0)
    """Sites of which the cohort could be drawn, N, those still at work on an earlier round included. With
    SCAFFOLD the most of this round and all earlier ones, as soon as its updates are aggregated."""
    control_weights: Mapped[dict[str, int]] = mapped_column(default_factory=dict)
    """With SCAFFOLD what the last update of each site weighed, this round's included."""
    reason: Mapped[str] = mapped_column(default="")
    model_digest: Mapped[str] = mapped_column(default="")
    """The model after the round."""
    sum_digest: Mapped[str] = mapped_column(default="")
    """The sum of the updates that are folded already."""
    model_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    delta_digest: Mapped[str] = mapped_column(default="")
    """That model as its change against ``base_digest``, encoded; empty if sites are told the whole."""
    delta_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    optimizer_digest: Mapped[str] = mapped_column(default="")
    """State of the server optimizer after the round; empty if it takes the mean as it is."""
    metrics: Mapped[dict[str, float]] = mapped_column(default_factory=dict)
    ended_at_s: Mapped[float] = mapped_column(default=0.0)
    adapter: Mapped[dict[str, Any]] = mapped_column(default_factory=dict)
    """What makes the model after the round, as ``Run.adapter``; nothing if that is as the run began."""


class Assignment(Base):
    """One piece of work for one site in one round."""

    __tablename__ = "assignments"
    __table_args__ = (
        ForeignKeyConstraint(["run_id"], ["runs.id"]),
        # Every round leaves its rows behind: what is asked all the time must not look at all of them.
        Index("ix_assignments_run_id_round", "run_id", "round"),
        Index("ix_assignments_site_run_id", "site", "run_id"),
        Index(
            "ix_assignments_open", "run_id", "round",
            sqlite_where=text("state = 'OPEN'"), postgresql_where=text("state = 'OPEN'"),
        ),
        Index(
            "ix_assignments_late", "run_id", "round",
            sqlite_where=text("is_late = 1"), postgresql_where=text("is_late"),
        ),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str]
    round: Mapped[int]
    attempt: Mapped[int]
    work: Mapped[Work]
    site: Mapped[str]
    model_digest: Mapped[str]
    """The model that the site starts from."""
    model_bytes: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[AssignmentState] = mapped_column(default=AssignmentState.OPEN)
    reason: Mapped[str] = mapped_column(default="")
    examples: Mapped[int] = mapped_column(BigInteger, default=0)
    tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    update_digest: Mapped[str] = mapped_column(default="")
    update_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    update_norm: Mapped[float] = mapped_column(default=0.0)
    """How far the update moved its model, as it came; 0 if nobody measured it."""
    turn: Mapped[int] = mapped_column(default=0)
    """How many trainings of an asynchronous run this is at its site; 0 in synchronous ones."""
    staleness: Mapped[int] = mapped_column(default=0)
    """Models that the run makes between the one that the site starts from and ``round``."""
    is_folded: Mapped[bool] = mapped_column(default=False)
    """Whether the round's sum holds the update, and no file of its own."""
    is_late: Mapped[bool] = mapped_column(default=False)
    """Whether ``round`` went on without it; the next one takes it over, at work or done."""
    bytes_down: Mapped[int] = mapped_column(BigInteger, default=0)
    bytes_up: Mapped[int] = mapped_column(BigInteger, default=0)
    metrics: Mapped[dict[str, float]] = mapped_column(default_factory=dict)
    measures: Mapped[bool] = mapped_column(default=False)
    """Whether the site measures the model that it starts from before it trains."""
    base_measured: Mapped[dict[str, Any]] = mapped_column(default_factory=dict)
    """What it measured of that model: ``SiteMetrics`` as its fields; empty if it did not."""
    data_examples: Mapped[int] = mapped_column(BigInteger, default=0)
    """Training examples that the site's data set makes; 0 if it did not tell."""
    alone_rounds: Mapped[int] = mapped_column(default=0)
    """Rounds whose steps the site takes by itself, if that is the work."""
    phase_seconds: Mapped[dict[str, float]] = mapped_column(default_factory=dict)
    metric_weights: Mapped[dict[str, int]] = mapped_column(default_factory=dict)
    """How many things a metric is the mean of."""
    metric_counts: Mapped[dict[str, list[int]]] = mapped_column(default_factory=dict)
    """Counts that add up over sites, for metrics that are no means."""

    @property
    def site_round(self) -> int:
        """The round as its site knows it; of an asynchronous run the number of the site's own training."""
        return self.turn or self.round - self.staleness

    @property
    def base_round(self) -> int:
        """The round that made the model from which a training starts; 0 for the initial one."""
        if self.work is Work.ALONE:
            return 0
        return self.round - self.staleness - 1

    @property
    def has_spooled_update(self) -> bool:
        """Whether an update that counts lies in the spool, or should."""
        return self.state is AssignmentState.DONE and self.work is Work.TRAIN and not self.is_folded


class Failure(Base):
    """One thing that went wrong in a run, at a site or at the coordinator."""

    __tablename__ = "failures"
    __table_args__ = (ForeignKeyConstraint(["run_id"], ["runs.id"]),)

    id: Mapped[str] = mapped_column(primary_key=True)
    """Made of what failed, so that saying it twice is saying it once."""
    run_id: Mapped[str] = mapped_column(index=True)
    at_s: Mapped[float]
    """Seconds since 1970."""
    cause: Mapped[str]
    """How it ended: an AssignmentState for a site's work, a RunState for the run's own."""
    message: Mapped[str]
    """What went wrong, in a line."""
    log: Mapped[str] = mapped_column(default="")
    """The last lines of the log or traceback, if any came."""
    site: Mapped[str] = mapped_column(default="")
    """Empty for what went wrong at the coordinator."""
    work: Mapped[str] = mapped_column(default="")
    round: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)


@lru_cache(maxsize=SPECS_KEPT)
def _spec_of(text: str) -> RunSpec:
    return RunSpec.model_validate_json(text)


def assignment_id(run_id: str, round_number: int, attempt: int, work: Work, site: str) -> str:
    """The name of an assignment: the same for every sending, and a plain file name."""
    return f"{run_id}.{round_number}.{attempt}.{work}.{site}"


def site_of(name: str) -> str:
    """The site that the name of an assignment tells; empty if it is no such name."""
    parts = name.split(".", maxsplit=4)
    return parts[4] if len(parts) == 5 else ""
