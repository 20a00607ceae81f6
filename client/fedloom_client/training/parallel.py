"""How a model lies over the ranks and in their memory: DDP, activations, number formats."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fedloom_client.training.group import Group
from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import Local


def distributed(module: nn.Module, group: Group) -> nn.Module:
    """What the ranks call instead of the module so that they have one gradient: its mean over them."""
    if group.world == 1 or isinstance(module, FSDPModule):  # a sharded one sees to it by itself
        return module
    # language models keep no running statistics; torch 2.13 renamed the switch and warns of the old name
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True}
    if group.device.type == "cuda":
        options["device_ids"] = [group.device]
    return DistributedDataParallel(module, **options)


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
