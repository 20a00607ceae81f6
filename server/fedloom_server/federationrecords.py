"""What the coordinator remembers besides runs: its sites, the audit log, metrics' samples, and its owner."""

from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, ForeignKeyConstraint, Integer
from sqlalchemy.orm import Mapped, mapped_column

from fedloom_server.records import Base


class SiteState(StrEnum):
    """What an operator lets a site do."""

    ACTIVE = "active"
    DRAINING = "draining"
    """It finishes what it has and gets nothing new."""
    BLOCKED = "blocked"
    """It may not attach."""


class AuditRow(Base):
    """One entry of the audit log's hash chain; never changed, never removed."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """From 1, without gaps."""
    at: Mapped[str]
    """When it was written, as ISO 8601 in UTC: text, as its hash covers every character."""
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    details: Mapped[str]
    """JSON as it was hashed."""
    previous: Mapped[str]
    hash: Mapped[str]


class SiteRecord(Base):
    """A site that has attached, or of which an operator has spoken."""

    __tablename__ = "sites"

    name: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[SiteState] = mapped_column(default=SiteState.ACTIVE)
    reason: Mapped[str] = mapped_column(default="")
    """Why it is draining or blocked, in the operator's words."""
    own_labels: Mapped[dict[str, str]] = mapped_column(default_factory=dict)
    """As the site told them when it last attached."""
    operator_labels: Mapped[dict[str, str]] = mapped_column(default_factory=dict)
    """They stand before the site's own; an empty value takes a label away."""
    description: Mapped[dict[str, Any]] = mapped_column(default_factory=dict)
    """What it last said of itself: ``eligibility.Description``."""
    first_heard_s: Mapped[float] = mapped_column(default=0.0)
    """Seconds since 1970; 0 before it has attached."""
    last_heard_s: Mapped[float] = mapped_column(default=0.0)
    """Seconds since 1970, written when a session begins or ends."""


class MetricPoint(Base):
    """A sample of what a site measured while it trained; ``metrics`` writes and reads it."""

    __tablename__ = "metrics"
    __table_args__ = (ForeignKeyConstraint(["run_id"], ["runs.id"]),)

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, init=False
    )
    run_id: Mapped[str] = mapped_column(index=True)
    round: Mapped[int]
    site: Mapped[str]
    name: Mapped[str]
    step: Mapped[int] = mapped_column(BigInteger)
    value: Mapped[float]
    at_s: Mapped[float]


class Owner(Base):
    """The coordinator that may write; there is one row."""

    __tablename__ = "owner"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    mark: Mapped[str]
    """Drawn anew at each start."""
