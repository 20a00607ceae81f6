"""Sharded models (FSDP2) on gloo ranks against one process; files from which any number of ranks goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedloom_client.training.orders import Order
from fedloom_client.training.sharding import without_memory
from fedloom_common.controls import add_controls

pytestmark = pytest.mark.timeout(900)  # processes that load torch, on a machine that may be busy

MakeOrder = Callable[..., Order]
SGD = {"name": "sgd", "lr": 0.1}
ADAMW = {"name": "adamw", "lr": 1e-2, "eps": 1e-3}  # so large that rounding of tiny gradients does not matter
LOCAL = {"steps": 4, "batch_examples": 8, "accumulation_steps": 2, "clip_norm": 0.5, "optimizer": ADAMW}


@pytest.fixture
def controlled(global_model: Path, tmp_path: Path) -> Path:
    add_controls(global_model, tmp_path / "controlled.safetensors")
    return tmp_path / "controlled.safetensors"


def test_two_ranks_with_half_a_model_each_do_what_one_process_does(
    ranks: Any, alone: Any, make_order: MakeOrder, controlled: Path, tmp_path: Path
) -> None:
    checkpoints = LOCAL | {"steps": 6, "checkpoint_every": 2}
    scaffold = LOCAL | {"optimizer": SGD, "algorithm": "scaffold"}
    ranks.add("adamw", local=LOCAL, kept="rounds")
    ranks.add("next-by-fsdp", local=LOCAL, kept="rounds", round_=2, id="next-a")
    ranks.add("next-by-ddp", local=LOCAL, kept="rounds", round_=2, id="next-b", sharding="ddp")
    ranks.add("recomputed", local=LOCAL | {"gradient_checkpointing": True})
    ranks.add("fedprox", local=LOCAL | {"algorithm": {"name": "fedprox", "mu": 1.0}})
    ranks.add("scaffold", local=scaffold, model_path=str(controlled))
    ranks.add("cut", local=checkpoints, kept="by-ddp", cut_after=4)
    ranks.add("resumed-by-ddp", local=checkpoints, kept="by-ddp", sharding="ddp")
    ranks.add("cut-again", local=checkpoints, kept="by-fsdp", cut_after=4, sharding="ddp")
    ranks.add("resumed-by-fsdp", local=checkpoints, kept="by-fsdp")
    held_out = {"evaluation": {"max_examples": 13}}
    ranks.add("measured", work="evaluate", spec=held_out, update_path="")
    ranks.add("whole", local=LOCAL, sharding="ddp")
    first, second = ranks.run(2)

    def expect(name: str, **changes: Any) -> float:
        alone.restart()
        order = make_order(update_path=str(tmp_path / f"alone-{name}.safetensors"), id=name, **changes)
        return float(alone.perform(order).metrics["loss"])

    assert first["adamw"]["loss"] == pytest.approx(expect("adamw", local=LOCAL), rel=1e-6)
    ranks.same("alone-adamw", "adamw")
    expect("next", local=LOCAL, round_=2)
    ranks.same("alone-next", "next-by-fsdp")
    ranks.same("alone-next", "next-by-ddp")
    ranks.same("alone-adamw", "recomputed")
    expect("fedprox", local=LOCAL | {"algorithm": {"name": "fedprox", "mu": 1.0}})
    ranks.same("alone-fedprox", "fedprox")
    expect("scaffold", local=scaffold, model_path=str(controlled))
    ranks.same("alone-scaffold", "scaffold", tolerance=1e-5)  # of (x − y)/Ση, ten times as large
    prepared = load_file(tmp_path / "scaffold" / "control" / "pending.safetensors")
    sent = load_file(tmp_path / "scaffold.safetensors")
    for name, tensor in prepared.items():  # cₖ and c are 0 at first
        assert torch.equal(tensor, sent[f"control/{name}"])
    expect("six", local=LOCAL | {"steps": 6})
    ranks.same("alone-six", "resumed-by-ddp")
    ranks.same("alone-six", "resumed-by-fsdp")
    assert first["measured"]["loss"] == pytest.approx(expect("m", work="evaluate", spec=held_out), rel=1e-6)
    for result in (first, second):
        assert result["adamw"]["held_bytes"] < 0.52 * result["whole"]["held_bytes"]


@pytest.mark.slow
def test_four_ranks_do_what_one_process_does_and_go_on_from_the_checkpoint_of_two(
    ranks: Any, alone: Any, make_order: MakeOrder, tmp_path: Path
) -> None:
    local = LOCAL | {"steps": 6, "checkpoint_every": 2, "accumulation_steps": 1}
    ranks.add("cut", local=local, kept="shared", cut_after=4)
    ranks.run(2)
    ranks.add("four", local=local)
    ranks.add("resumed", local=local, kept="shared")
    ranks.add("whole", local=local, sharding="ddp")
    results = ranks.run(4)
    order = make_order(local=local, update_path=str(tmp_path / "alone.safetensors"))
    alone.perform(order)
    for name in ("four", "resumed", "whole"):
        ranks.same("alone", name)
    for result in results:
        assert result["four"]["held_bytes"] < 0.28 * result["whole"]["held_bytes"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_with_half_a_model_each_do_what_one_process_does(
    ranks: Any, alone: Any, make_order: MakeOrder, tmp_path: Path
) -> None:
    local = LOCAL | {"precision": "fp32"}
    ranks.add("shards", local=local)
    ranks.add("recomputed", local=local | {"gradient_checkpointing": True})
    ranks.add("bf16", local=local | {"precision": "bf16"})
    results = ranks.run(2, "cuda")
    order = make_order(local=local, update_path=str(tmp_path / "alone.safetensors"))
    expected = alone.perform(order).metrics["loss"]
    for name in ("shards", "recomputed"):
        ranks.same("alone", name, tolerance=1e-4)  # other devices, other sums
    assert results[0]["bf16"]["loss"] == pytest.approx(expected, rel=0.01)


def test_parameters_without_memory_have_all_else() -> None:
    with without_memory():
        module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module[0].weight.shape == (2, 3)
    assert module[1].running_var.tolist() == [1, 1]
    assert not torch.nn.Linear(2, 2).weight.is_meta
