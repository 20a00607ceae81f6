"""Inner optimizers, the learning rate over the run, and the optimizer's state between rounds."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fedloom_client.training.group import Group
from fedloom_client.training.plan import RoundPlan
from fedloom_client.training.sharding import Gather, first_writes, placed_like
from fedloom_common import rates
from fedloom_common.errors import BadTensor, TrainingFailed
from fedloom_common.runspec import SGD, AdamW, Local, Schedule
from fedloom_common.tensors import read_tensors, write_tensors


def new_optimizer(spec: AdamW | SGD, module: nn.Module) -> torch.optim.Optimizer:
    """The run's optimizer without state, on the parameters that are trained."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if isinstance(spec, SGD):
        fused = not isinstance(parameters[0], DTensor)  # torch has no fused SGD for sharded parameters
        return torch.optim.SGD(
            parameters, spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, fused=fused
        )
    return torch.optim.AdamW(
        parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
    )


def rate_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step of the run, counted from 0.

    Linear warm-up reaches the peak at step ``warmup_steps``; cosine is at ``final_ratio`` after the last.
    """
    return rates.rate_factor(schedule.kind, schedule.warmup_steps, schedule.final_ratio, step, total_steps)


def rate_sum(local: Local, plan: RoundPlan) -> float:
    """The learning rates of a round's steps, added up."""
    steps = range(plan.first_rate_step, plan.first_rate_step + plan.steps)
    return local.optimizer.lr * sum(rate_factor(local.schedule, step, plan.total_steps) for step in steps)


def state_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state by names that hold for a file; plain SGD has none."""
    states = optimizer.state_dict()["state"]
    return {
        f"{name}:{key}": value
        for number, name in enumerate(_trained_names(module))
        for key, value in states.get(number, {}).items()
        if isinstance(value, torch.Tensor)
    }


def load_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Give an optimizer the state that ``state_tensors`` told.

    Raises:
        KeyError: a tensor is of a parameter that the model does not have.
    """
    numbers = {name: number for number, name in enumerate(_trained_names(module))}
    parameters = dict(module.named_parameters())
    states: dict[int, dict[str, torch.Tensor]] = {}
    for label, tensor in tensors:
        name, _, key = label.rpartition(":")
        states.setdefault(numbers[name], {})[key] = placed_like(tensor, parameters[name])
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


class KeptState:
    """The optimizer's state after each finished round, as safetensors files in the run's folder.

    The newest two stay: a round that is tried again begins from the state before it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(
        self, optimizer: torch.optim.Optimizer, module: nn.Module, after_round: int, group: Group
    ) -> None:
        """Write the state that a finished round left, and drop all but the one before.

        Raises:
            TrainingFailed: there is no room.
        """
        tensors = state_tensors(optimizer, module)
        first_writes(group, tensors, lambda whole: self._write(tensors, after_round, whole))

    def load(self, optimizer: torch.optim.Optimizer, module: nn.Module, before_round: int) -> None:
        """Give a new optimizer the state that the last finished round before ``before_round`` left, if any.

        Raises:
            TrainingFailed: the file is damaged, or not of this model.
        """
        rounds = [round_ for round_ in self._rounds() if round_ < before_round]
        if not rounds:
            return
        file = self._file(max(rounds))
        try:
            load_state(optimizer, module, read_tensors(file))
        except (BadTensor, KeyError) as error:
            raise TrainingFailed(
                f"the kept optimizer state {file} cannot be used ({error}): delete it to begin a new one"
            ) from error

    def _write(self, tensors: dict[str, torch.Tensor], after_round: int, whole: Gather) -> None:
        if tensors:  # plain SGD has none
            write_tensors(self._file(after_round), tensors, whole=whole)
        keep = sorted(round_ for round_ in self._rounds() if round_ <= after_round)[-2:]
        for round_ in set(self._rounds()).difference(keep):
            self._file(round_).unlink()

    def _rounds(self) -> list[int]:
        return [
            int(file.stem.removeprefix("optimizer-")) for file in self._folder.glob("optimizer-*.safetensors")
        ]

    def _file(self, round_: int) -> Path:
        return self._folder / f"optimizer-{round_}.safetensors"


def _trained_names(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]
