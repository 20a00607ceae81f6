"""A run spec's server optimizer: what the coordinator makes of a round's mean.

With θ the present model and θ̄ what the rule made of the updates, θ − θ̄ is taken for a gradient.
"""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fedloom_common.strict import Strict, by_kind, by_name

_Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[_Beta, _Beta]


class RoundSchedule(Strict):
    """The server's learning rate over the run's rounds."""

    kind: Literal["constant", "cosine"] = "constant"
    """Shape after warm-up."""
    warmup_rounds: int = Field(default=0, ge=0)
    """Rounds of linear rise to the peak."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak that cosine ends at."""


RoundScheduleOrKind = Annotated[
    RoundSchedule,
    BeforeValidator(by_kind, json_schema_input_type=Literal["constant", "cosine"] | RoundSchedule),
]
"""A field's type for a schedule: ``cosine`` or ``{kind: cosine, warmup_rounds: 5}``."""


class FedAvg(Strict):
    """θ ← θ − η (θ − θ̄), which with η = 1 is θ̄ itself, bit for bit."""

    name: Literal["fedavg"] = "fedavg"
    lr: float = Field(default=1.0, gt=0)
    """η, peak learning rate."""
    schedule: RoundScheduleOrKind = RoundSchedule()
    """Learning rate over the rounds."""


class FedAvgM(Strict):
    """FedAvg with momentum: torch.optim.SGD on θ − θ̄."""

    name: Literal["fedavgm"] = "fedavgm"
    lr: float = Field(default=1.0, gt=0)
    """η, peak learning rate; steps are 1/(1 − momentum) times as long in the end."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum."""
    schedule: RoundScheduleOrKind = RoundSchedule()
    """Learning rate over the rounds."""


class DiLoCo(Strict):
    """Nesterov momentum: torch.optim.SGD with ``nesterov=True`` on θ − θ̄."""

    name: Literal["diloco"] = "diloco"
    lr: float = Field(default=0.7, gt=0)
    """η, peak learning rate; 0.4 to 0.6 suit up to four sites better."""
    momentum: float = Field(default=0.9, gt=0, lt=1)
    """Momentum."""
    schedule: RoundScheduleOrKind = RoundSchedule()
    """Learning rate over the rounds."""


class _Adaptive(Strict):
    lr: float | None = Field(default=None, gt=0)
    """η, peak learning rate; 1e-2 with SGD at the sites, 1e-3 with AdamW or adapters if not given."""
    tau: float = Field(default=1e-3, gt=0)
    """τ, term added to the denominator: the smaller, the more a step's length is the same for all values."""
    initial_v: float | None = Field(default=None, ge=0)
    """Second moment before the first round; τ² if not given, the least that the paper allows."""
    schedule: RoundScheduleOrKind = RoundSchedule()
    """Learning rate over the rounds."""


class FedAdam(_Adaptive):
    """Adam on θ − θ̄."""

    name: Literal["fedadam"] = "fedadam"
    betas: Betas = (0.9, 0.99)
    """β₁ and β₂, decay of the first and second moment."""
    bias_correction: bool = False
    """Whether the moments are corrected for having begun with 0, as torch.optim.Adam does and the paper does
    not; with ``initial_v: 0``."""

    @model_validator(mode="after")
    def _corrects_what_began_with_zero(self) -> Self:
        if self.bias_correction and self.initial_v != 0:
            raise ValueError("bias_correction is for moments that begin with 0: give initial_v: 0 too")
        return self


class FedYogi(_Adaptive):
    """Yogi on θ − θ̄: as Adam, but the second moment shrinks slowly."""

    name: Literal["fedyogi"] = "fedyogi"
    betas: Betas = (0.9, 0.99)
    """β₁ and β₂, decay of the first and second moment."""


class FedAdagrad(_Adaptive):
    """Adagrad on θ − θ̄: the second moment is the sum of all squares, and only grows."""

    name: Literal["fedadagrad"] = "fedadagrad"
    beta: float = Field(default=0.0, ge=0, lt=1)
    """β₁, decay of the first moment."""


AnyServerOptimizer = FedAvg | FedAvgM | DiLoCo | FedAdam | FedYogi | FedAdagrad
_Name = Literal["fedavg", "fedavgm", "diloco", "fedadam", "fedyogi", "fedadagrad"]

ServerOptimizer = Annotated[
    Annotated[AnyServerOptimizer, Field(discriminator="name")],
    BeforeValidator(by_name, json_schema_input_type=_Name | AnyServerOptimizer),
]
"""A field's type for a server optimizer: ``diloco`` or ``{name: diloco, lr: 0.5}``."""
