"""What the daemon asks of the training process and what it hears back, as JSON lines.

The daemon imports this room at start-up, so torch may not enter it.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fedloom_common.errors import ProtocolError, TrainingFailed

LARGEST_COUNT = (1 << 63) - 1  # that the contract and the coordinator's database hold

LINE_LIMIT_BYTES = 16 << 20  # a run spec may hold a large model config; no honest line comes near

CHECKPOINT = "checkpoint.safetensors"
"""A training under way, in the run's folder; the daemon removes it when the update is in the outbox."""

SPARE_UPDATE = "spare.safetensors"
"""A file beside Order.update_path that the update overwrites if it is there: that takes half the time."""


class Cancelled(Exception):
    """The daemon no longer wants the work; raised on every rank at the same step."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One piece of work for the worker group."""

    id: str
    """Assignment.id."""
    work: Literal["train", "evaluate", "alone"]
    run_id: str
    round: int
    """From 1; 0 for the evaluation of the initial model."""
    model_path: str
    """Global model, a safetensors file."""
    assets_dir: str
    """Folder with config.json and the tokenizer's files."""
    spec: dict[str, Any]
    """RunSpec as JSON."""
    schedule_round: int = 0
    """The round at which the learning rate's schedule stands; 0 for ``round``."""
    frozen: dict[str, str] = field(default_factory=dict)
    """Where an adapter is trained: files that are not, by name, such as ``base.safetensors``."""
    folds: tuple[str, ...] = ()
    """Files of changes to the base's weights, first to last."""
    measures: bool = False
    """Whether to measure the global model before a training's first step."""
    alone_rounds: int = 0
    """Rounds whose steps to take alone; 0 for other work."""
    update_path: str = ""
    """Where a training leaves the trained tensors, atomically; not used by an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The site's data set: the fields of config.DataSource, which this side may not import."""

    format: Literal["text", "jsonl", "parquet", "dataset"]
    files: tuple[str, ...]
    fields: dict[str, str]
    held_out: float


@dataclass(frozen=True, kw_only=True)
class Job:
    """An order with what the site adds to it; enough for a rank on any of the site's hosts."""

    order: Order
    source: Source
    directory: str
    """The run's own folder at the site, for the optimizer's state."""
    packed: str
    """The data set's folder, for packed data."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks hold the model."""

    def to_json(self) -> str:
        """The job as one line of text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The job that ``to_json`` wrote."""
        data = json.loads(text)
        source = data["source"] | {"files": tuple(data["source"]["files"])}
        order = Order(**data["order"] | {"folds": tuple(data["order"]["folds"])})
        return cls(**data | {"order": order, "source": Source(**source)})


@dataclass(frozen=True, kw_only=True)
class WorkerProgress:
    """How far the worker group has come with an order."""

    phase: Literal["start", "prepare", "train", "evaluate"]
    done: int = 0
    """Optimizer steps in train, batches in evaluate; in prepare bytes of text files, or records."""
    total: int = 0
    """Units in all; 0 if not known."""
    loss: float | None = None
    """Mean training loss since the last report, in nats a token."""
    tokens_per_s: float | None = None
    """Training throughput over all ranks."""


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What came of an order."""

    examples: int
    """Examples trained on (nₖ), or held-out examples measured."""
    tokens: int
    """Tokens that the loss was taken on."""
    metrics: dict[str, float]
    weights: dict[str, int] = field(default_factory=dict)
    """How many things a metric is the mean of: ``tokens`` for the loss and ``examples`` for others if not
    given."""
    counts: dict[str, list[int]] = field(default_factory=dict)
    """Counts that add up over sites, for metrics that are no means."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase: start, prepare, train, evaluate."""
    update_path: str | None = None
    """The trained tensors, after training."""
    before: "WorkerResult | None" = None
    """What was measured of the global model before the training."""
    data_examples: int = 0
    """Training examples that the data set makes; 0 after an evaluation."""

    @classmethod
    def of(cls, body: dict[str, Any]) -> "WorkerResult":
        """The result that came as JSON.

        Raises:
            TrainingFailed: a number is none that may be sent, as a plug-in's may be.
        """
        before = body.get("before")
        result = cls(**body | {"before": None if before is None else cls.of(before)})
        for name, found in (("weights", result.weights), ("counts", result.counts)):
            for metric, value in found.items():
                numbers = value if isinstance(value, list) else [value]
                if not all(isinstance(number, int) and 0 <= number <= LARGEST_COUNT for number in numbers):
                    raise TrainingFailed(
                        f"the task's {name} of {metric} are {value!r}; wanted are whole numbers from 0 up"
                    )
        for metric, figure in result.metrics.items():
            if not isinstance(figure, int | float):
                raise TrainingFailed(f"the task's {metric} is {figure!r}; wanted is a number")
        return result


def encode(kind: str, body: Any = None) -> bytes:
    """One message as a line."""
    return json.dumps([kind, body], allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> tuple[str, Any]:
    """The kind and body of a message.

    Raises:
        ProtocolError: the line is no message.
    """
    try:
        kind, body = json.loads(line)
    except ValueError as error:
        raise ProtocolError(
            f"the training process said something that is no message: {line[:80]!r}"
        ) from error
    return kind, body
