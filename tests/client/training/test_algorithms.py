"""Site algorithms, against plain torch with the proximal term in the loss, and against numpy by hand."""

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
from fedloom_client.training.controls import SiteControls
from fedloom_client.training.group import Group
from fedloom_client.training.orders import Order
from fedloom_client.training.roundalgorithm import RoundStart
from fedloom_common.controls import add_controls
from fedloom_common.errors import BadTensor, TrainingFailed
from fedloom_common.runspec import FedProx
from fedloom_common.tensors import write_tensors

MakeOrder = Callable[..., Order]
SGD = {"name": "sgd", "lr": 0.1}
SCAFFOLD = {"optimizer": SGD, "algorithm": "scaffold"}


def blocks_of(directory: Path) -> np.ndarray:
    """The packed training examples of 32 tokens."""
    (folder,) = (directory / "data").iterdir()
    tokens = np.fromfile(folder / "train/input_ids.bin", np.uint16).astype(np.int64)
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


def test_fedprox_pulls_a_weight_that_the_step_does_not_use(tmp_path: Path) -> None:
    module = nn.ModuleDict({"used": nn.Linear(1, 1, bias=False), "resting": nn.Linear(1, 1, bias=False)})
    start = RoundStart(
        trained=dict(module.named_parameters()), global_model=tmp_path / "none", rate_sum=1.0,
        controls=SiteControls(tmp_path),
    )  # fmt: skip
    algorithm = begin_round(FedProx(name="fedprox", mu=0.5), start)
    with torch.no_grad():
        module["resting"].weight += 3.0
    module["used"](torch.ones(1)).sum().backward()
    algorithm.add_to_objective()
    assert module["resting"].weight.grad.item() == pytest.approx(0.5 * 3.0)
    assert module["used"].weight.grad.item() == pytest.approx(1.0)


def perform_killed(alone: Any, order: Order, after: int) -> None:
    """Do an order in a process that is killed after some steps, and again in another."""
    taken, real = 0, torch.optim.SGD.step

    def step(self: Any, closure: Any = None) -> None:
        nonlocal taken
        taken += 1
        if taken > after:
            raise KeyboardInterrupt
        real(self, closure)

    alone.restart()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.SGD, "step", step)
        alone.perform(order)
    alone.restart()
    alone.perform(order)


@pytest.fixture
def controlled_model(global_model: Path, tmp_path: Path) -> Path:
    """The global model with control variates that are not zero."""
    with_zeros = tmp_path / "with-controls.safetensors"
    add_controls(global_model, with_zeros)
    torch.manual_seed(5)
    tensors = load_file(with_zeros)
    for name in tensors:
        if name.startswith("control/"):
            tensors[name] = torch.randn_like(tensors[name]) * 0.01
    write_tensors(tmp_path / "controlled.safetensors", tensors)
    return tmp_path / "controlled.safetensors"


@pytest.mark.parametrize("algorithm", [{"name": "fedprox", "mu": 1.0}, {"name": "scaffold"}], ids=str)
def test_rounds_that_go_on_from_checkpoints_end_with_the_bytes_of_undisturbed_ones(
    alone: Any,
    make_order: MakeOrder,
    global_model: Path,
    controlled_model: Path,
    tmp_path: Path,
    algorithm: dict[str, Any],
) -> None:
    model = controlled_model if algorithm["name"] == "scaffold" else global_model
    local = {
        "steps": 6,
        "checkpoint_every": 2,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "algorithm": algorithm,
    }

    def rounds(folder: str, perform: Callable[[Order], Any]) -> list[bytes]:
        alone.directory = tmp_path / folder
        updates = []
        for round_ in (1, 2):
            order = make_order(local=local, round_=round_, model_path=str(model))
            perform(order)
            if algorithm["name"] == "scaffold":
                SiteControls(alone.directory).leavings.commit(order.id)
            updates.append(Path(order.update_path).read_bytes())
        return updates

    undisturbed = rounds("undisturbed", alone.perform)
    assert rounds("killed", lambda order: perform_killed(alone, order, after=3)) == undisturbed


def second_update(alone: Any, make_order: MakeOrder, model: Path, settle: str) -> bytes:
    first = make_order(local=SCAFFOLD, model_path=str(model))
    alone.perform(first)
    getattr(SiteControls(alone.directory).leavings, settle)(first.id)
    second = make_order(local=SCAFFOLD, round_=2, model_path=str(model))
    alone.perform(second)
    return Path(second.update_path).read_bytes()


def test_control_variates_count_once_their_update_is_delivered_and_not_before(
    alone: Any, make_order: MakeOrder, controlled_model: Path, tmp_path: Path
) -> None:
    delivered = second_update(alone, make_order, controlled_model, "commit")
    alone.directory = tmp_path / "given-up"
    given_up = second_update(alone, make_order, controlled_model, "discard")
    alone.directory = tmp_path / "never"
    only = make_order(
        local=SCAFFOLD,
        round_=2,
        model_path=str(controlled_model),
    )
    alone.perform(only)
    assert given_up == Path(only.update_path).read_bytes() != delivered


def test_a_round_tried_again_begins_from_the_control_variates_before_it(
    alone: Any, make_order: MakeOrder, controlled_model: Path
) -> None:
    updates = []
    for name, round_ in (("a", 1), ("b", 2), ("c", 2)):
        order = make_order(local=SCAFFOLD, round_=round_, id=name, model_path=str(controlled_model))
        SiteControls(alone.directory).leavings.settle(round_, None)
        alone.perform(order)
        SiteControls(alone.directory).leavings.deliver(order.id)
        updates.append(Path(order.update_path).read_bytes())
    assert updates[1] == updates[2]
    files = {file.name for file in (alone.directory / "control").iterdir()}
    assert files == {"kept.safetensors", "delivered.safetensors"}


def test_scaffold_without_control_variates_in_the_global_model_says_so(
    alone: Any, make_order: MakeOrder
) -> None:
    with pytest.raises(BadTensor, match=r"no tensor control/transformer\.wte\.weight of shape \[257, 32\]"):
        alone.perform(make_order(local=SCAFFOLD))


def test_control_variates_of_another_model_are_named(
    alone: Any, make_order: MakeOrder, controlled_model: Path
) -> None:
    controls = SiteControls(alone.directory)
    group = Group(0, 1, torch.device("cpu"), None)
    controls.prepare({"other": torch.ones(2)}, make_order(id="x"), group)
    controls.leavings.commit("x")
    with pytest.raises(TrainingFailed, match=r"kept\.safetensors cannot be used .*delete the file"):
        alone.perform(make_order(local=SCAFFOLD, round_=2, model_path=str(controlled_model)))
