"""How a model lies over the ranks and in their memory: DDP, activations, number formats."""

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fedloom_client.training.examples import Examples
from fedloom_client.training.ranks import TRAINING, Rank
from fedloom_client.training.tasks import Inputs, Task
from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import Local


class Loss(nn.Module):
    """A task's loss as a forward pass, so that DDP looks for parameters that the loss itself does without."""

    def __init__(self, task: Task, module: nn.Module) -> None:
        super().__init__()
        self.task, self.module = task, module

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """Mean loss over a batch's targets."""
        return self.task.loss(self.module, inputs)


def distributed(rank: Rank, examples: Examples) -> nn.Module:
    """What takes the loss on a rank so that all have one gradient: its mean over them.

    All ranks call this, and it takes a backward pass of one example; no gradient is left of it.
    """
    group = rank.group
    trained = (parameter for parameter in rank.model.parameters() if parameter.requires_grad)
    if group.world == 1 or any(isinstance(parameter, DTensor) for parameter in trained):
        return Loss(rank.task, rank.model)  # what is cut into shards sees to it by itself
    # language models keep no running statistics; torch 2.13 renamed the switch and warns of the old name
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True}
    options["init_sync"] = False  # all have read the same file, and frozen weights may lie in shards
    if group.device.type == "cuda":
        options["device_ids"] = [group.device]
    # looking for them costs every step a walk through its graph, and one more exchange of the ranks
    options["find_unused_parameters"] = _has_unused_parameters(rank, examples)
    return DistributedDataParallel(Loss(rank.task, rank.model), **options)


def _has_unused_parameters(rank: Rank, examples: Examples) -> bool:
    """Whether some rank's example gives a trained parameter no gradient: BigBird's pooler gets none."""
    batch = rank.batch(examples, np.array([rank.group.rank % len(examples)]), TRAINING, 0)
    rank.model.train()
    with rank.autocast():
        loss = rank.task.loss(rank.model, batch.inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    trained = (parameter for parameter in rank.model.parameters() if parameter.requires_grad)
    unused = sum(parameter.grad is None for parameter in trained)
    rank.model.zero_grad(set_to_none=True)
    return bool(rank.group.sum(torch.tensor([float(unused)], device=rank.group.device)).item())


def compute_activations_again(module: Any) -> None:
    """Have the model's layers keep their inputs alone, and compute the rest again in the backward pass.

    Source: Chen et al. 2016, arXiv:1604.06174.

    Raises:
        TrainingFailed: transformers cannot do it with this model.
    """
    options = {"use_reentrant": False}
    try:
        if hasattr(module, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
            module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise TrainingFailed(
            f"local.gradient_checkpointing is true, but this model has no checkpoints: {error} Leave it out, "
            "and raise local.accumulation_steps where memory is short"
        ) from error


def autocast_type(local: Local, device: torch.device) -> torch.dtype | None:
    """The forward pass's number format; None for the weights' own."""
    made_for_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = local.precision == "bf16" or (local.precision == "auto" and made_for_it)
    return torch.bfloat16 if wanted else None
