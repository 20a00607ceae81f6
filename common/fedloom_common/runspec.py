"""The run spec: everything that an operator decides about a run, in one file.

The coordinator and every site read the same spec; what belongs to one machine
(paths of data, devices, certificates) is in that machine's own config instead.
"""

import json
import re
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedloom_common.codecs.spec import AS_IS, Codecs
from fedloom_common.errors import BadSpec
from fedloom_common.requirements import Require

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]


class Strict(BaseModel):
    """A part of a spec or config: unknown keys are errors, numbers are finite, values are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # JSON has neither: a run that was saved with one could not be read again
    )


class ModelSpec(Strict):
    """Which model is trained, and with which tokenizer."""

    path: str | None = None
    """Directory at the coordinator with a pretrained causal language model; give this or ``config``."""
    config: dict[str, Any] | None = None
    """A transformers config with its ``model_type``; the coordinator draws its weights from the seed."""
    tokenizer: str = "auto"
    """``bytes`` (UTF-8 bytes, 256 tokens and one end-of-text token), a directory at the coordinator, or
    ``auto``: the model directory's own, and ``bytes`` for a model from ``config``."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (a model directory) or config (a new model), and not both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs a model_type, such as gpt2 or llama")
        return self


class CausalLM(Strict):
    """Next-token prediction on packed text."""

    kind: Literal["causal_lm"] = "causal_lm"
    context_tokens: int = Field(default=128, ge=8, le=1 << 20)
    """Length of one training example, in tokens; texts are joined and cut to this length."""


class Staleness(Strict):
    """What an update counts that began τ versions of the model ago, or whose round went on τ rounds ago."""

    exponent: float = Field(default=0.5, ge=0, le=10)
    """a of the factor (1 + τ)^−a on the update's change; 0 counts old and new alike."""
    max: int = Field(default=20, ge=0)
    """Largest τ: a training that falls further behind is given up, and its site begins anew."""


class Cohort(Strict):
    """Which sites take part in a round, and how many must."""

    require: Require = Require()
    """What a site must have to take part, such as ``{gpu_memory_gb: 40, label: icu}``."""
    policy: Name = "uniform"
    """How a round picks from the sites that fit: ``uniform`` (each as likely as the other), ``weighted`` (by
    examples), ``round_robin`` (who waits longest), ``all``, or a plug-in's name."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the sites that fit that a round picks."""
    min_sites: int = Field(default=1, ge=1)
    """A round begins when so many sites that fit are connected, and picks no fewer."""
    quorum: int | None = Field(default=None, ge=1)
    """Updates needed for a round to count; ``min_sites`` if not given."""
    over_select: float = Field(default=0.0, ge=0, le=10)
    """Share of further sites that a round asks: it goes on as soon as as many updates have come as it would
    have asked for without them. 0.25 asks 10 sites for 8 updates."""
    late: Literal["refuse", "carry"] = "refuse"
    """What becomes of sites that are still at work when a round goes on: their work is called off, or
    they finish it and a later round takes their updates, as changes of the model that they began with."""
    staleness: Staleness = Staleness(max=4)
    """What late updates count, with ``late: carry``."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds after which a round goes on with the updates that have come; none if not given."""
    stall_s: float = Field(default=300, gt=0)
    """Seconds without any progress after which a site's assignment is given up."""
    attempts: int = Field(default=3, ge=1)
    """Times that a round with too few updates is tried at once; then the run waits for its sites."""

    @property
    def needed(self) -> int:
        """Updates needed for a round to count."""
        return self.quorum or self.min_sites

    @model_validator(mode="after")
    def _all_is_all(self) -> Self:
        if self.policy == "all" and self.fraction != 1:
            raise ValueError(
                f"policy all picks every site, and fraction is {self.fraction:g}: drop one of both"
            )
        return self

    @model_validator(mode="after")
    def _quorum_can_be_met(self) -> Self:
        if self.quorum is not None and self.quorum > self.min_sites:
            raise ValueError(
                f"quorum is {self.quorum} but min_sites is {self.min_sites}: a round could pick too few "
                "sites to ever meet it; raise min_sites or lower quorum"
            )
        return self


class AdamW(Strict):
    """torch.optim.AdamW."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
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


class Schedule(Strict):
    """Learning rate over the *whole run's* steps, not over one round's."""

    kind: Literal["cosine", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise to the peak."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak that cosine ends at."""


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
    optimizer: Annotated[AdamW | SGD, Field(discriminator="name")] = AdamW()
    """Inner optimizer."""
    keep_optimizer_state: bool = True
    """Whether the optimizer's state stays at the site from round to round, or is reset in each."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints on the site's disk, from which a killed rank or daemon goes on; without them
    it takes the round's steps again. A checkpoint takes the model's size, and the optimizer's state's."""
    schedule: Schedule = Schedule()
    """Learning rate over the run."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; null for no clipping."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; ``auto`` is bf16 on devices made for it and fp32 elsewhere. Weights stay as they are."""

    @model_validator(mode="before")
    @classmethod
    def _optimizer_has_a_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("optimizer"), dict):
            return data | {"optimizer": {"name": "adamw"} | data["optimizer"]}
        return data

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


class Aggregation(Strict):
    """How updates become the next global model."""

    rule: Literal["weighted_mean"] = "weighted_mean"
    """The weighted mean  Σ nₖ/n θₖ  (FedAvg)."""
    max_examples: int | None = Field(default=None, ge=1)
    """Largest nₖ that an update may claim; an update that claims more is rejected."""
    deterministic: bool = False
    """Whether updates are folded in cohort order: the same updates give the same bytes in whatever order
    they arrive, but those of fast sites may wait on disk for a slow one's."""


class Transport(Strict):
    """How models and updates are made smaller for the wire: a chain of codecs for each direction.

    A chain is a stage or a list of them, such as ``up: int8`` and ``down: [bf16, zstd]``.
    """

    up: Codecs = AS_IS
    """Updates, on their way from the sites; all but ``fp32`` tell the change against the round's model."""
    down: Codecs = AS_IS
    """New global models, on their way to the sites; all but ``fp32`` tell the change against the model
    before, to sites that hold it. What a lossy chain tells is the new model, for all; what it leaves out
    the coordinator always adds to the next round's change, whatever ``error_feedback`` says."""


class Evaluation(Strict):
    """Measuring the global model on the sites' held-out data."""

    every_rounds: int = Field(default=1, ge=0)
    """Rounds between evaluations; 0 for none. The last round is always evaluated otherwise."""
    initial: bool = True
    """Whether the initial model is evaluated before round 1."""
    max_examples: int | None = Field(default=None, ge=1)
    """Most held-out examples that each site measures; all if not given."""
    deadline_s: float = Field(default=3600, gt=0)
    """Seconds after which a model's metrics are those of the sites that have measured it."""


class Target(Strict):
    """Stop when a metric is good enough."""

    metric: str = "loss"
    """Metric of the round, as ``fedloom run show`` names it."""
    value: float
    """Stop at this value or better."""
    higher_is_better: bool = False
    """Direction of the metric."""


class Patience(Strict):
    """Stop when a metric no longer gets better."""

    metric: str = "loss"
    """Metric of the round, as ``fedloom run show`` names it."""
    evaluations: int = Field(ge=1)
    """Stop after so many evaluations in a row without improvement."""
    min_delta: float = Field(default=0.0, ge=0)
    """Smallest change that counts as improvement."""
    higher_is_better: bool = False
    """Direction of the metric."""


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


class Stop(Strict):
    """Conditions that end a run before its last round; the first to hold wins."""

    target: Target | None = None
    """Stop when a metric is good enough."""
    patience: Patience | None = None
    """Stop when a metric no longer gets better."""
    wall_s: float | None = Field(default=None, gt=0)
    """Stop at the end of the round in which the run has lasted so many seconds."""


_ONLY_IN_ROUNDS = (
    ("cohort", "fraction", "mode.concurrency says how many sites train at a time"),
    ("cohort", "quorum", "mode.buffer says how many updates make a version"),
    ("cohort", "over_select", "mode.concurrency says how many sites train at a time"),
    ("cohort", "late", "every update counts when it comes; mode.staleness says how much"),
    ("cohort", "staleness", "mode.staleness says what an update counts"),
    ("cohort", "deadline_s", "nobody waits for a site; mode.staleness.max says how late it may be"),
    ("cohort", "attempts", "a site that fails is replaced at once, and nothing is tried again"),
    ("aggregation", "deterministic", "which updates make a version depends on when they come"),
    ("transport", "down", "it tells a model's change to sites that hold the one before, which few do then"),
)
"""What has no meaning without rounds, and what to do instead."""


class RunSpec(Strict):
    """A run, whole."""

    name: Name
    """Name for people: small letters, digits, dots, dashes and underscores."""
    model: ModelSpec
    """Which model is trained."""
    task: CausalLM = CausalLM()
    """What the model is trained to do."""
    data: Name
    """Name of the data set; every site says in its own config which files that is."""
    rounds: int = Field(ge=1, le=1_000_000)
    """Rounds at most."""
    mode: Annotated[Sync | Async, Field(discriminator="kind")] = Sync()
    """Whether sites work in rounds, or each at its own pace."""
    cohort: Cohort = Cohort()
    """Which sites take part in a round."""
    local: Local
    """What each site does in a round."""
    aggregation: Aggregation = Aggregation()
    """How updates become the next global model."""
    transport: Transport = Transport()
    """How models and updates are made smaller for the wire."""
    evaluation: Evaluation = Evaluation()
    """Measuring the global model."""
    stop: Stop = Stop()
    """Conditions that end the run early."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Source of all randomness: initial weights, cohorts, data order, dropout."""

    @model_validator(mode="after")
    def _nothing_contradicts_the_mode(self) -> Self:
        if isinstance(self.mode, Sync):
            return self
        for section, key, instead in _ONLY_IN_ROUNDS:
            part = getattr(self, section)
            came, default = getattr(part, key), type(part).model_fields[key].default
            if came != default:
                told = part.model_dump(mode="json")[key]
                raise ValueError(f"{section}.{key} is {told}, but mode.kind is async: {instead}")
        if self.cohort.policy == "all" and self.mode.concurrency is not None:
            raise ValueError(
                f"cohort.policy all asks every site, and mode.concurrency is {self.mode.concurrency}: "
                "drop one of both"
            )
        return self

    @model_validator(mode="after")
    def _stop_metric_is_measured(self) -> Self:
        if self.evaluation.every_rounds == 0 and (self.stop.target or self.stop.patience):
            raise ValueError("stop.target and stop.patience need evaluation.every_rounds of 1 or more")
        return self

    @model_validator(mode="after")
    def _late_updates_are_not_deterministic(self) -> Self:
        if self.cohort.late == "carry" and self.aggregation.deterministic:
            raise ValueError(
                "cohort.late: carry and aggregation.deterministic contradict each other: which round takes a "
                "late update depends on when it comes; drop one of them"
            )
        return self


class _Yaml(yaml.SafeLoader):
    """YAML as people and JSON write it: 1e-5 is a number, which YAML 1.1 reads as text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_run_spec(text: str) -> RunSpec:
    """Read a run spec from YAML or JSON text.

    Raises:
        BadSpec: one line for each wrong key or value: its path, what came, what was wanted.
    """
    try:
        data = yaml.load(text, _Yaml)  # noqa: S506 (a safe loader)
    except yaml.YAMLError as error:
        raise BadSpec(f"the run spec is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise BadSpec(f"a run spec is a mapping with keys such as name and model, not {type(data).__name__}")
    try:
        return RunSpec.model_validate(data)
    except ValidationError as error:
        raise BadSpec("the run spec has mistakes:\n" + describe(error)) from error


def read_run_spec(json_text: str) -> RunSpec:
    """Read a run spec as the coordinator sends it: JSON, with every default.

    Raises:
        BadSpec: it is not one; the coordinator's release may be another.
    """
    try:
        return RunSpec.model_validate_json(json_text)
    except ValidationError as error:
        raise BadSpec("the coordinator's run spec has mistakes:\n" + describe(error)) from error


def describe(error: ValidationError) -> str:
    """Every mistake that pydantic found, a line each: path, what was wanted, what came."""
    return "\n".join(_describe_one(item) for item in error.errors())


def run_spec_schema() -> str:
    """JSON Schema of the run spec, for editors and other languages."""
    return json.dumps(RunSpec.model_json_schema(), indent=2)


def _describe_one(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"]) or "(the whole)"
    wanted = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        wanted = "no such key"
    if item["type"] == "missing":
        return f"  {path}: required, but not given"
    came = repr(item["input"])
    if isinstance(item["input"], dict) or len(came) > 80:
        return f"  {path}: {wanted}"
    return f"  {path}: {wanted} (came: {came})"
