"""What the loop and the trainer ask of a site algorithm, and what they tell it of a round."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from fedloom_client.training.controls import SiteControls


@dataclass(frozen=True, kw_only=True)
class RoundStart:
    """A round as it begins: the model holds the global model's values."""

    trained: Mapping[str, nn.Parameter]
    """What training changes, by its names in the global model's file."""
    global_model: Path
    rate_sum: float
    """Sum of the learning rates of the round's steps, those before a checkpoint included."""
    controls: SiteControls


@dataclass(frozen=True, kw_only=True)
class Left:
    """What an algorithm leaves at the end of a round, besides the model."""

    in_update: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors that travel with the model."""
    at_site: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Control variates that stay, and count once the update does."""


class RoundAlgorithm(Protocol):
    """One round of a site algorithm on one rank.

    It is made anew for each round, so that a training that goes on from a checkpoint begins with the
    same one. Gradients are those that all ranks agree on.
    """

    def add_to_objective(self) -> None:
        """Add the gradient of what is minimised besides the loss; clipping then applies to the sum."""

    def correct(self) -> None:
        """Change the clipped gradient into the one that the optimizer is to follow."""

    def end(self) -> Left:
        """What is left after the last step; the algorithm is used up."""


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's gradient; zero, and no longer None, if this step's loss does not depend on it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
