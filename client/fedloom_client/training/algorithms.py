"""Site algorithms: what happens to a step's gradients between the backward pass and the optimizer.

The loop calls two hooks at every step. An algorithm is made anew for each round, of the model as the
round found it, so that a training that goes on from a checkpoint begins with the same one.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn

from fedloom_common.runspec import FedProx, Plain


class RoundAlgorithm(Protocol):
    """One round of a site algorithm on one rank; gradients are those that all ranks agree on."""

    def add_to_objective(self) -> None:
        """Add the gradient of what is minimised besides the loss; clipping then applies to the sum."""

    def correct(self) -> None:
        """Change the clipped gradient into the one that the optimizer is to follow."""


class PlainRound:
    """The loss, and nothing else."""

    def add_to_objective(self) -> None:
        """Nothing."""

    def correct(self) -> None:
        """Nothing."""


class FedProxRound:
    """The gradient of  μ/2 ‖w − wᵗ‖²  joins the loss's:  ∇F(w) + μ (w − wᵗ).

    Source: Li et al. 2020, arXiv:1812.06127, algorithm 2.
    Memory: wᵗ, a copy of the weights that are trained, and one tensor.
    """

    def __init__(self, spec: FedProx, parameters: Iterable[nn.Parameter]) -> None:
        self._mu = spec.mu
        self._starts = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def add_to_objective(self) -> None:
        """Add μ (w − wᵗ)."""
        for parameter, start in self._starts:
            gradient_of(parameter).add_(parameter - start, alpha=self._mu)

    def correct(self) -> None:
        """Nothing."""


def begin_round(spec: Plain | FedProx, module: nn.Module) -> RoundAlgorithm:
    """The run's algorithm for a round that begins with the module's present weights."""
    if isinstance(spec, FedProx):
        return FedProxRound(spec, trained(module).values())
    return PlainRound()


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; a tied one has one of its names."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's gradient; zero, and no longer None, if this step's loss does not depend on it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
