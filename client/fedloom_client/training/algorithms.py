"""Site algorithms: what happens to a step's gradients between the backward pass and the optimizer."""

import torch

from fedloom_client.training.roundalgorithm import Left, RoundAlgorithm, RoundStart, gradient_of
from fedloom_client.training.scaffold import ScaffoldRound
from fedloom_common.runspec import FedProx, Plain, Scaffold


def begin_round(spec: Plain | FedProx | Scaffold, start: RoundStart) -> RoundAlgorithm:
    """The run's algorithm for a round.

    Raises:
        BadTensor, TrainingFailed: what the algorithm needs of the global model or the site is not there.
    """
    if isinstance(spec, FedProx):
        return FedProxRound(spec, start)
    return ScaffoldRound(start) if isinstance(spec, Scaffold) else PlainRound()


class PlainRound:
    """The loss, and nothing else."""

    def add_to_objective(self) -> None:
        """Nothing."""

    def correct(self) -> None:
        """Nothing."""

    def end(self) -> Left:
        """Nothing."""
        return Left()


class FedProxRound(PlainRound):
    """The gradient of  μ/2 ‖w − wᵗ‖²  joins the loss's:  ∇F(w) + μ (w − wᵗ).

    Source: Li et al. 2020, arXiv:1812.06127, algorithm 2.
    Memory: wᵗ, a copy of the weights that are trained, and one tensor.
    """

    def __init__(self, spec: FedProx, start: RoundStart) -> None:
        self._mu = spec.mu
        self._starts = [(parameter, parameter.detach().clone()) for parameter in start.trained.values()]

    @torch.no_grad()
    def add_to_objective(self) -> None:
        """Add μ (w − wᵗ)."""
        for parameter, start in self._starts:
            gradient_of(parameter).add_(parameter - start, alpha=self._mu)
