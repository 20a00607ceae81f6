"""A run spec's adapter: small matrices are trained instead of the model, which stays frozen under them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from fedloom_common.codecs.spec import AS_IS
from fedloom_common.runspec.serveroptimizers import FedAvg
from fedloom_common.strict import Name, Strict

if TYPE_CHECKING:
    from fedloom_common.runspec.run import RunSpec

Precision = Literal["fp32", "bf16", "int8", "nf4"]


class Lora(Strict):
    """Low-rank adapters by peft: W + α/r · B·A, of which only A and B are trained and travel."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=4096)
    """Rows of A and columns of B."""
    alpha: float = Field(default=32.0, gt=0)
    """B·A counts α/rank times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped in training."""
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    """Layers that get an adapter: the ends of their names; ``all-linear`` for every linear layer but the
    output's; ``auto`` for peft's choice for the model type, and ``all-linear`` where it has none."""
    merge: Literal["fedex", "ffa", "fedit", "stack"] = "fedex"
    """How adapters of several sites become one. ``fedex``: A and B are averaged, and what the average of
    their products is beyond that is folded into the frozen weights: exact. ``ffa``: A stays as it was drawn,
    so that the average of B is exact. ``fedit``: A and B are averaged, and nothing else. ``stack``: the
    average of the products is folded into the frozen weights, and each round begins with new adapters."""
    ranks: dict[Name, int] = Field(default={})
    """With ``stack``: ranks of single sites, by name; ``rank`` for all others."""
    base_precision: Precision = "fp32"
    """In what sites hold the frozen weights: ``int8`` and ``nf4`` need CUDA and bitsandbytes there."""

    @property
    def needs_all_updates(self) -> bool:
        """Whether the merge looks at all updates of a round together."""
        return self.merge in ("fedex", "stack")

    @property
    def largest_rank(self) -> int:
        """The rank of the global adapter's file."""
        return max(self.rank, *self.ranks.values()) if self.ranks else self.rank

    def rank_of(self, site: str) -> int:
        """The rank with which a site trains."""
        return self.ranks.get(site, self.rank)

    def objections(self, spec: "RunSpec") -> Iterator[str]:
        """What else in a run spec does not go with this merge, and what to do instead."""
        if self.needs_all_updates:
            exact = (
                f"model.adapter.merge is {self.merge}, which merges the fresh updates of one round exactly"
            )
            if spec.mode.kind == "async":
                yield f"{exact}, but mode.kind is async: take merge ffa or fedit, or rounds"
            if spec.aggregation.rule.is_robust:
                yield f"{exact}, but aggregation.rule is {spec.aggregation.rule.name}: take merge ffa"
            if spec.aggregation.clip is not None:
                yield f"{exact} as they came, but aggregation.clip is given: take merge ffa or fedit"
            if spec.aggregation.server_optimizer != FedAvg():
                name = spec.aggregation.server_optimizer.name
                yield f"{exact}, but aggregation.server_optimizer is {name}: take merge ffa or fedit"
            if spec.cohort.late == "carry":
                yield f"{exact}, but cohort.late is carry: take merge ffa or fedit, or drop late updates"
        if self.merge == "stack":
            new = "model.adapter.merge is stack, and each round begins with new adapters"
            if spec.local.algorithm.name == "scaffold":
                yield f"{new}: control variates of old ones are of no use; take plain or fedprox"
            if spec.transport.down != AS_IS:
                yield f"{new}: there is no change for transport.down to tell; leave it at fp32"
            if spec.transport.feeds_back:
                yield f"{new}: what transport.up leaves out of old ones is of no use; drop error_feedback"

    @model_validator(mode="after")
    def _targets_have_names(self) -> Self:
        if not isinstance(self.target_modules, str) and not all(self.target_modules):
            raise ValueError("target_modules has an empty name; give the ends of layers' names")
        if self.target_modules == ():
            raise ValueError("target_modules is empty: give names of layers, auto or all-linear")
        return self

    @model_validator(mode="after")
    def _ranks_are_stacked(self) -> Self:
        if self.ranks and self.merge != "stack":
            raise ValueError(
                f"ranks differ by site, but merge is {self.merge}, which averages A and B: matrices of "
                "different ranks have no average; set merge to stack, or drop ranks"
            )
        for site, rank in self.ranks.items():
            if not 1 <= rank <= 4096:
                raise ValueError(f"ranks gives {site} rank {rank}, wanted 1 to 4096")
        return self
