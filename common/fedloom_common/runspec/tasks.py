"""A run spec's task: what the model is trained to do, and how long an example is."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedloom_common.strict import Strict

TaskKind = Literal["causal_lm"]
"""Every kind of task that fedloom brings, as sites' policies name them."""

Context = Annotated[int, Field(ge=8, le=1 << 20)]


class _Task(Strict):
    _auto: ClassVar[str] = ""
    weighs: ClassVar[Literal["examples", "tokens"]] = "examples"
    """What nₖ counts. The loss is a mean over targets: where examples have different numbers of them, the
    mean over sites is that over all their data only if each counts by its targets."""

    @property
    def model_class(self) -> str:
        """The class of transformers that makes the model."""
        return self._auto

    @property
    def longest(self) -> int:
        """Most tokens that the model must read at once."""
        raise NotImplementedError

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

    kind: Literal["causal_lm"] = "causal_lm"
    context_tokens: Context = 128
    """Length of one training example, in tokens; texts are joined and cut to this length."""


Task = CausalLM
