"""What a task is, to the rest of the training process and to whoever writes one of their own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Arrays = dict[str, NDArray[Any]]
"""A batch by field: [examples, values]."""
Inputs = Mapping[str, torch.Tensor]
"""A batch by field, int64 on the rank's device: [examples, values]."""
Sums = Mapping[str, torch.Tensor]
"""What is added up over batches and ranks, by name."""

IGNORED = -100
"""The label of a token that is no target, as everywhere in transformers."""


class BadRecord(ValueError):
    """A record is unfit for the task; the message says what came, what was wanted, and what to do.

    Its first line goes to the coordinator and quotes nothing of the record; further lines may, see
    ``policy.failure_details``.
    """


@dataclass(frozen=True, kw_only=True)
class Example:
    """What one record is to the model."""

    values: Mapping[str, Sequence[int]]
    """By the names of ``padding``."""
    is_shortened: bool = False
    """Whether the record was too long and lost something."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A site's metrics, and what lets the coordinator combine them with other sites'."""

    metrics: dict[str, float]
    weights: dict[str, int] = field(default_factory=dict)
    """How many things a metric is the mean of; if not given, targets for the loss, else examples."""
    counts: dict[str, list[int]] = field(default_factory=dict)
    """Counts that add up over sites, for metrics that are no means: ``hits``, ``predicted`` and ``actual``,
    one for each label, make ``macro_f1``."""


class Task(Protocol):
    """One kind of training. Its losses are means over the targets of a batch."""

    @property
    def padding(self) -> Mapping[str, int]:
        """The fields of an example whose length differs, and what fills them up in a batch.

        With ``input_ids`` among them, a batch gets an ``attention_mask``.
        """
        ...

    @property
    def token_fields(self) -> Sequence[str]:
        """The fields that hold tokens."""
        ...

    @property
    def is_even(self) -> bool:
        """Whether all examples have the same number of targets, so that ranks need not add theirs up."""
        ...

    @property
    def sampled_examples(self) -> int:
        """Held-out examples that ``sample`` is given."""
        ...

    def batch(self, arrays: Arrays, random: Iterator[np.random.Generator]) -> Arrays:
        """What to put on the device for some examples; one generator for each of them."""
        ...

    def targets(self, arrays: Arrays) -> int:
        """Number of targets in what ``batch`` returned."""
        ...

    def loss(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Mean loss over a batch's targets; 0 if it has none."""
        ...

    def measure(self, model: nn.Module, inputs: Inputs) -> Sums:
        """What to add up over held-out batches; the same names and shapes every time, ``loss`` among them."""
        ...

    def sample(self, model: nn.Module, inputs: Inputs) -> Sums:
        """As ``measure``, over ``sampled_examples`` of the held-out examples: for what takes long."""
        ...

    def metrics(self, sums: Mapping[str, Sequence[float]], targets: int) -> Measured:
        """The metrics of the held-out examples that were measured."""
        ...


class TextTask(Task, Protocol):
    """A task whose examples are cut from one long row of tokens."""

    @property
    def tokens(self) -> int:
        """One more than the largest token that the tokenizer knows."""
        ...

    @property
    def separator(self) -> int:
        """The token that ends a text."""
        ...

    @property
    def block_tokens(self) -> int:
        """Tokens of an example as it lies on disk."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """The tokens of each text."""
        ...


@runtime_checkable
class RecordTask(Task, Protocol):
    """A task with one example a record."""

    @property
    def fields(self) -> Sequence[str]:
        """The fields that every record must have."""
        ...

    @property
    def needs(self) -> str:
        """What records the task needs, as the beginning of a sentence."""
        ...

    def example(self, record: Mapping[str, Any]) -> Example | None:
        """A record as an example; None if it leaves nothing to learn from.

        Raises:
            BadRecord: it is unfit.
        """
        ...


AnyTask = TextTask | RecordTask


@dataclass(frozen=True, kw_only=True)
class PluginSetting:
    """What the entry point of a task that a site has installed is given; it returns a RecordTask."""

    options: Mapping[str, Any]
    """``task.options`` of the run spec."""
    context_tokens: int
    """Most tokens of an example."""
    tokenizer: Any
    """As transformers' AutoTokenizer loads it."""
    config: Mapping[str, Any]
    """The model's config.json."""
    padding: int
    """The token that fills batches up."""
