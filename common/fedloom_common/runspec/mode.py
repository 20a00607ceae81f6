"""A run spec's mode: whether sites work in rounds, or each at its own pace."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedloom_common.runspec.cohort import Staleness
from fedloom_common.strict import Strict, by_kind


class Sync(Strict):
    """Rounds: the sites of a cohort train from the same model, and the round waits for their updates."""

    kind: Literal["sync"] = "sync"


class Async(Strict):
    """Buffered asynchronous aggregation (FedBuff): no site waits for another.

    ``rounds`` are then versions of the model, each made of the next ``buffer`` updates that come.
    """

    kind: Literal["async"]
    buffer: int = Field(ge=1, le=100_000)
    """Updates that make a new version of the model, K."""
    concurrency: int | None = Field(default=None, ge=1)
    """Sites that train at the same time, at most; all that fit if not given."""
    staleness: Staleness = Staleness()
    """What an update from an older version counts."""
    server_lr: float = Field(default=1.0, gt=0)
    """Factor on the step that a version makes."""


AnyMode = Sync | Async

Mode = Annotated[
    Annotated[AnyMode, Field(discriminator="kind")],
    BeforeValidator(by_kind, json_schema_input_type=Literal["sync", "async"] | AnyMode),
]
"""A field's type for a mode: ``sync`` or ``{kind: async, buffer: 4}``."""
