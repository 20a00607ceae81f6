"""A run spec's local training: what a site does in a round, and with which optimizer."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fedloom_common.runspec.algorithms import Algorithm, Plain, Scaffold
from fedloom_common.strict import Strict, by_kind, by_name

Decay = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Strict):
    """torch.optim.AdamW."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Term added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""


class SGD(Strict):
    """torch.optim.SGD."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum."""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty."""


AnyOptimizer = AdamW | SGD

Optimizer = Annotated[
    Annotated[AnyOptimizer, Field(discriminator="name")],
    BeforeValidator(by_name, json_schema_input_type=Literal["adamw", "sgd"] | AnyOptimizer),
]
"""A field's type for an inner optimizer: ``sgd`` or ``{name: sgd, lr: 0.1}``."""


class Schedule(Strict):
    """Learning rate over the *whole run's* steps, not over one round's."""

    kind: Literal["cosine", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise to the peak."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak that cosine ends at."""


ScheduleOrKind = Annotated[
    Schedule, BeforeValidator(by_kind, json_schema_input_type=Literal["cosine", "constant"] | Schedule)
]
"""A field's type for a schedule: ``constant`` or ``{kind: cosine, warmup_steps: 100}``."""


class Local(Strict):
    """What each site does in a round."""

    steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Optimizer steps in a round; give this or ``epochs``."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the site's training data in a round; give this or ``steps``."""
    batch_examples: int = Field(default=32, ge=1, le=1_000_000)
    """Examples in one optimizer step at one site, over all of its ranks and accumulation steps."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Parts that a rank's share of the batch is cut into, to fit in memory."""
    optimizer: Optimizer = AdamW()
    """Inner optimizer."""
    algorithm: Algorithm = Plain()
    """What the steps aim at besides the loss on the site's own data."""
    keep_optimizer_state: bool = True
    """Whether the optimizer's state stays at the site from round to round, or is reset in each."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints on the site's disk, from which a killed rank or daemon goes on; without them
    it takes the round's steps again. A checkpoint takes the model's size, and the optimizer's state's."""
    schedule: ScheduleOrKind = Schedule()
    """Learning rate over the run."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; null for no clipping."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; ``auto`` is bf16 on devices made for it and fp32 elsewhere. Weights stay as they are."""
    gradient_checkpointing: bool = False
    """Whether activations of the model's layers are computed again for the gradient instead of being kept:
    the same numbers with less memory, for one more forward pass."""

    @model_validator(mode="before")
    @classmethod
    def _optimizer_has_a_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("optimizer"), dict):
            return data | {"optimizer": {"name": "adamw"} | data["optimizer"]}
        return data

    @model_validator(mode="after")
    def _scaffold_takes_sgd(self) -> Self:
        plain = isinstance(self.optimizer, SGD) and self.optimizer.momentum == 0
        if isinstance(self.algorithm, Scaffold) and not plain:
            raise ValueError(
                "algorithm scaffold needs optimizer: {name: sgd} without momentum: it takes a site's "
                "change, divided by the learning rates, for the mean of its gradients, which holds for no "
                "other optimizer; set it, or choose fedprox or plain"
            )
        return self

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, and not both")
        if self.batch_examples % self.accumulation_steps:
            raise ValueError(
                f"batch_examples is {self.batch_examples}, which accumulation_steps "
                f"({self.accumulation_steps}) does not divide"
            )
        return self
