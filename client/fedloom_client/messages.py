"""What site and coordinator say to each other about work, free of protobuf."""

from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["queued", "download", "start", "prepare", "train", "evaluate", "encode", "wait", "upload"]


@dataclass(frozen=True, kw_only=True)
class Blob:
    """One immutable file that the coordinator serves."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A model as its change against another one."""

    file: Blob
    """The change, encoded by the spec's ``transport.down``."""
    base_digest: str
    """The model that it is told against."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One piece of work; the id is the same every time the coordinator sends it."""

    id: str
    work: Literal["train", "evaluate", "alone"]
    run_id: str
    round: int
    """From 1; 0 for the evaluation of the initial model."""
    attempt: int
    model: Blob
    assets: tuple[Blob, ...]
    """Files that make the architecture and tokenizer."""
    spec_json: str
    deadline_s: float
    """Seconds, from its arrival, until the result is no longer wanted; 0 for no deadline."""
    delta: Delta | None = None
    """A smaller way to the model, if its base is here."""
    schedule_round: int = 0
    """The round at which the learning rate's schedule stands; 0 for ``round``."""
    frozen: tuple[Blob, ...] = ()
    """What an adapter's run does not train: the base, and A if B alone is trained."""
    folds: tuple[Blob, ...] = ()
    """Changes of the base's weights, first to last."""
    measures: bool = False
    """Whether to measure the model before a training's first step."""
    alone_rounds: int = 0
    """Rounds whose steps to take alone; 0 for other work."""
    counted_round: int | None = None
    """The last round whose update of this site counted, 0 if none did; None if that is not told."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an assignment has come."""

    assignment_id: str
    phase: Phase
    done: int = 0
    total: int = 0
    """Units in all; 0 if not known."""
    loss: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the site measured of a model on its held-out data."""

    examples: int
    tokens: int
    metrics: dict[str, float]
    weights: dict[str, int] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a finished assignment."""

    assignment_id: str
    update_digest: str = ""
    """Empty after anything but a training for the run."""
    update_bytes: int = 0
    examples: int
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    """How many things a metric is the mean of, where that is not told by its name."""
    counts: dict[str, list[int]] = field(default_factory=dict)
    """Counts that add up over sites."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    before: Measurement | None = None
    """What a training measured of the model that it began from."""
    data_examples: int = 0
    """Training examples that the data set makes; 0 after an evaluation."""

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Outcome":
        """An outcome as ``dataclasses.asdict`` wrote it, and JSON kept it."""
        before = facts.get("before")
        return cls(**facts | {"before": None if before is None else Measurement(**before)})


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The site's policy does not permit an assignment."""

    assignment_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The site tried an assignment and could not finish it."""

    assignment_id: str
    reason: str
    kept: str = ""
    """What of the reason stays at the site."""


Answer = Outcome | Refusal | Failure
