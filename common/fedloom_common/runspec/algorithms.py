"""A run spec's site algorithm: what a site's optimizer steps aim at, besides the loss on its own data."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedloom_common.strict import Strict, by_name


class Plain(Strict):
    """The loss on the site's own data, and nothing else (FedAvg)."""

    name: Literal["plain"] = "plain"


class FedProx(Strict):
    """The loss, and  μ/2 ‖w − wᵗ‖²  that holds the site near the round's global model wᵗ.

    Source: Li et al. 2020, arXiv:1812.06127, algorithm 2.
    """

    name: Literal["fedprox"]
    mu: float = Field(default=0.01, gt=0)
    """μ: the larger, the nearer; the paper tunes it from {0.001, 0.01, 0.1, 1}."""


class Scaffold(Strict):
    """Gradients corrected by control variates for what a site's data differs from the others':  g − cₖ + c.

    The global model's file and every update hold the control variates too, so both are twice as large.
    Source: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, option II.
    """

    name: Literal["scaffold"]


_AnyAlgorithm = Plain | FedProx | Scaffold
_AlgorithmName = Literal["plain", "fedprox", "scaffold"]

Algorithm = Annotated[
    Annotated[_AnyAlgorithm, Field(discriminator="name")],
    BeforeValidator(by_name, json_schema_input_type=_AlgorithmName | _AnyAlgorithm),
]
"""A mapping with a name, or the name alone: ``algorithm: fedprox``."""
