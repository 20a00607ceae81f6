"""Activations that are computed again instead of being kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedloom_client.training.models import LocalModel
from fedloom_client.training.orders import Order
from fedloom_client.training.parallel import compute_activations_again
from fedloom_common.errors import TrainingFailed

MakeOrder = Callable[..., Order]


def kept_bytes(module: nn.Module) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass."""
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = module.transformer(input_ids=torch.zeros(4, 64, dtype=torch.int64)).last_hidden_state
    assert hidden.requires_grad
    return sum(kept.values())


def test_gradient_checkpointing_keeps_a_fraction_of_the_activations(assets: Path, global_model: Path) -> None:
    module = LocalModel(assets, global_model, torch.device("cpu")).module.train()
    everything = kept_bytes(module)
    compute_activations_again(module)
    assert kept_bytes(module) < everything / 4


def test_gradient_checkpointing_changes_no_number(alone: Any, make_order: MakeOrder, tmp_path: Path) -> None:
    alone.perform(make_order(update_path=str(tmp_path / "kept")))
    alone.restart()
    local = {"gradient_checkpointing": True}
    alone.perform(make_order(local=local, id="other", update_path=str(tmp_path / "again")))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "kept").read_bytes()


def test_a_model_without_checkpoints_says_what_to_do_instead() -> None:
    class Plain(nn.Module):
        def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any) -> None:
            raise ValueError("Plain does not support activation checkpointing.")

    with pytest.raises(TrainingFailed, match=r"Plain does not support.*raise local\.accumulation_steps"):
        compute_activations_again(Plain())
