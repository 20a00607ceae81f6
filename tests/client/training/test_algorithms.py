"""Site algorithms, against plain torch with the proximal term in the loss, and against numpy by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DistributedSampler
from transformers import AutoConfig, AutoModelForCausalLM

from fedloom_client.training.algorithms import begin_round
from fedloom_client.training.orders import Order
from fedloom_common.runspec import FedProx

MakeOrder = Callable[..., Order]


def blocks_of(directory: Path) -> np.ndarray:
    """The packed training examples of 32 tokens."""
    (folder,) = (directory / "data").iterdir()
    facts = json.loads((folder / "facts.json").read_text())
    tokens = np.fromfile(folder / "train.bin", facts["dtype"]).astype(np.int64)
    return tokens[: len(tokens) // 32 * 32].reshape(-1, 32)


@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_fedprox_minimises_the_loss_and_the_distance_from_the_global_model(
    alone: Any, make_order: MakeOrder, assets: Path, global_model: Path, clip_norm: float | None
) -> None:
    mu, rate = 2.0, 0.1
    local = {
        "steps": 6,
        "optimizer": {"name": "sgd", "lr": rate},
        "schedule": {"kind": "constant"},
        "clip_norm": clip_norm,
        "algorithm": {"name": "fedprox", "mu": mu},
    }
    order = make_order(local=local)
    result = alone.perform(order)

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets))
    model.load_state_dict(load_file(global_model), strict=False)
    model.tie_weights()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    blocks, losses = blocks_of(alone.directory), []
    numbers = list(DistributedSampler(range(len(blocks)), num_replicas=1, rank=0, seed=3, drop_last=True))  # type: ignore[arg-type]
    for step in range(6):
        examples = torch.from_numpy(blocks[numbers[step * 8 : step * 8 + 8]])
        loss = model(input_ids=examples, labels=examples).loss
        distance = sum(((w - s) ** 2).sum() for w, s in zip(model.parameters(), start, strict=True))
        (loss + mu / 2 * distance).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
        model.zero_grad()
        losses.append(loss.item())

    update, expected = load_file(order.update_path), model.state_dict()
    for name, tensor in update.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0, msg=name)
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)  # of the data, not of the pull


def test_fedprox_pulls_a_weight_that_the_step_does_not_use() -> None:
    module = nn.ModuleDict({"used": nn.Linear(1, 1, bias=False), "resting": nn.Linear(1, 1, bias=False)})
    algorithm = begin_round(FedProx(name="fedprox", mu=0.5), module)
    with torch.no_grad():
        module["resting"].weight += 3.0
    module["used"](torch.ones(1)).sum().backward()
    algorithm.add_to_objective()
    assert module["resting"].weight.grad.item() == pytest.approx(0.5 * 3.0)
    assert module["used"].weight.grad.item() == pytest.approx(1.0)


def test_a_fedprox_round_that_goes_on_from_a_checkpoint_is_held_by_the_global_model(
    alone: Any, make_order: MakeOrder, tmp_path: Path
) -> None:
    local = {"steps": 6, "checkpoint_every": 2, "algorithm": {"name": "fedprox", "mu": 1.0}}
    undisturbed = make_order(local=local, update_path=str(tmp_path / "undisturbed"))
    alone.perform(undisturbed)
    alone.restart()
    order = make_order(local=local, id="again", update_path=str(tmp_path / "again"))
    taken, real = 0, torch.optim.AdamW.step

    def step(self: Any, closure: Any = None) -> None:
        nonlocal taken
        taken += 1
        if taken > 3:
            raise KeyboardInterrupt
        real(self, closure)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", step)
        alone.perform(order)
    alone.restart()
    alone.perform(order)
    assert Path(order.update_path).read_bytes() == (tmp_path / "undisturbed").read_bytes()
