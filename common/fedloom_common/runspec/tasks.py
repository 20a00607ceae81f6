"""A run spec's task: what the model is trained to do, and how long an example is."""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fedloom_common.strict import Name, Strict, by_kind

TaskKind = Literal["causal_lm", "masked_lm", "classification", "seq2seq", "instruction"]
"""Every kind of task that fedloom brings, as sites' policies name them."""

Context = Annotated[int, Field(ge=8, le=1 << 20)]

MOST_LABELS = 4096
SHORTENED = "shortened_share"
"""Of records that were longer than an example may be; texts are cut into as many as they make."""


class _Task(Strict):
    _auto: ClassVar[str] = ""
    weighs: ClassVar[Literal["examples", "tokens"]] = "examples"
    """What nₖ counts. The loss is a mean over targets: where examples have different numbers of them, the
    mean over sites is that over all their data only if each counts by its targets."""
    _metrics: ClassVar[tuple[str, ...] | None] = None

    @property
    def metrics(self) -> tuple[str, ...] | None:
        """What sites measure; None where only they know."""
        return self._metrics

    @property
    def model_class(self) -> str:
        """The class of transformers that makes the model."""
        return self._auto

    @property
    @abstractmethod
    def longest(self) -> int:
        """Most tokens that the model must read at once."""

    @property
    def most_targets(self) -> int:
        """Most tokens of one example that the loss may be taken on."""
        return self.longest


class _WithContext(_Task):
    context_tokens: Context = 128
    """Length of one training example, in tokens."""

    @property
    def longest(self) -> int:
        return self.context_tokens


class CausalLM(_WithContext):
    """Next-token prediction on packed text."""

    _auto: ClassVar[str] = "AutoModelForCausalLM"
    _metrics: ClassVar = ("loss", "perplexity", "bits_per_byte")

    kind: Literal["causal_lm"] = "causal_lm"
    context_tokens: Context = 128
    """Length of one training example, in tokens; texts are joined and cut to this length."""


class MaskedLM(_WithContext):
    """Prediction of tokens that are hidden, on packed text.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1; masks are drawn anew in every step (Liu et al.
    2019, arXiv:1907.11692).
    """

    _auto: ClassVar[str] = "AutoModelForMaskedLM"
    weighs: ClassVar[Literal["examples", "tokens"]] = "tokens"
    _metrics: ClassVar = ("loss", "perplexity", "token_accuracy")

    kind: Literal["masked_lm"] = "masked_lm"
    context_tokens: Context = 128
    """Length of one training example, in tokens; texts are joined and cut to this length."""
    masked_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are to be predicted: 8 in 10 are hidden, 1 in 10 is replaced at random, and
    1 in 10 stays as it is."""


class Classification(_WithContext):
    """One of several labels for each text."""

    _auto: ClassVar[str] = "AutoModelForSequenceClassification"
    _metrics: ClassVar = ("loss", "accuracy", "macro_f1", SHORTENED)

    kind: Literal["classification"] = "classification"
    labels: tuple[str, ...] = Field(min_length=2, max_length=MOST_LABELS)
    """The labels' names, in the order of the model's outputs; records hold a name, or its number from 0."""
    context_tokens: Context = 128
    """Most tokens of one text; longer ones lose their end."""

    @property
    def most_targets(self) -> int:
        """One label."""
        return 1

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        twice = sorted({name for name in self.labels if self.labels.count(name) > 1})
        if twice:
            raise ValueError(f"labels has {', '.join(twice)} more than once")
        return self


class Seq2Seq(_Task):
    """A target text for each source text."""

    _auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    weighs: ClassVar[Literal["examples", "tokens"]] = "tokens"
    _metrics: ClassVar = ("loss", "perplexity", "token_accuracy", SHORTENED)

    kind: Literal["seq2seq"] = "seq2seq"
    source_tokens: Context = 128
    """Most tokens of a source text; longer ones lose their end."""
    target_tokens: Context = 64
    """Most tokens of a target text; longer ones lose their end."""
    prefix: str = ""
    """Put before every source text, such as ``summarize: ``."""
    generate_examples: int = Field(default=64, ge=0)
    """Held-out examples for which each site writes a target text, greedily, to measure exact match and
    ROUGE-L; 0 for none."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """With those of written targets, if any are written."""
        return (*self._metrics, "exact_match", "rouge_l") if self.generate_examples else self._metrics

    @property
    def longest(self) -> int:
        return max(self.source_tokens, self.target_tokens)

    @property
    def most_targets(self) -> int:
        return self.target_tokens


class Instruction(_WithContext):
    """Answers to prompts and in conversations, through the tokenizer's chat template."""

    _auto: ClassVar[str] = "AutoModelForCausalLM"
    weighs: ClassVar[Literal["examples", "tokens"]] = "tokens"
    _metrics: ClassVar = ("loss", "perplexity", "token_accuracy", SHORTENED)

    kind: Literal["instruction"] = "instruction"
    context_tokens: Context = 512
    """Most tokens of one conversation; longer ones lose their end."""


class Plugin(_WithContext):
    """A task that sites have installed themselves; see docs/tasks.md."""

    weighs: ClassVar[Literal["examples", "tokens"]] = "tokens"

    kind: Literal["plugin"] = "plugin"
    name: Name
    """Its entry point in the group ``fedloom.tasks``; a site's policy must name it too."""
    auto_class: str = Field(pattern=r"^AutoModel(For[A-Za-z0-9]+)?$")
    """The class of transformers that makes the model, such as ``AutoModelForTokenClassification``."""
    context_tokens: Context = 128
    """Most tokens of one example, and most targets."""
    options: dict[str, Any] = Field(default={})
    """What the plug-in reads."""
    model_options: dict[str, Any] = Field(default={})
    """Entries of the model's config that the task needs, such as ``{num_labels: 9}``."""

    @property
    def model_class(self) -> str:
        return self.auto_class


AnyTask = CausalLM | MaskedLM | Classification | Seq2Seq | Instruction | Plugin

Task = Annotated[
    Annotated[AnyTask, Field(discriminator="kind")],
    BeforeValidator(by_kind, json_schema_input_type=TaskKind | Literal["plugin"] | AnyTask),
]
"""A field's type for a task: ``masked_lm`` or ``{kind: masked_lm, context_tokens: 256}``."""
