"""Sharded models (FSDP2) on gloo ranks against one process; files from which any number of ranks goes on."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedloom_client.config import DataSource
from fedloom_client.training.orders import Job, Order, Source
from fedloom_client.training.sharding import without_memory
from fedloom_common.controls import add_controls

pytestmark = pytest.mark.timeout(900)  # processes that load torch, on a machine that may be busy

MakeOrder = Callable[..., Order]
SGD = {"name": "sgd", "lr": 0.1}
ADAMW = {"name": "adamw", "lr": 1e-2, "eps": 1e-3}  # so large that rounding of tiny gradients does not matter
LOCAL = {"steps": 4, "batch_examples": 8, "accumulation_steps": 2, "clip_norm": 0.5, "optimizer": ADAMW}


class Ranks:
    """Lists of jobs for ranks, done by processes, and for one process, as what they must equal."""

    def __init__(self, texts: DataSource, make_order: MakeOrder, folder: Path) -> None:
        self._source, self._make_order, self._folder = Source(**texts.model_dump()), make_order, folder
        self._jobs: dict[str, Any] = {}

    def add(
        self,
        name: str,
        *,
        kept: str = "",
        sharding: str = "fsdp",
        cut_after: int | None = None,
        **changes: Any,
    ) -> None:
        """A job; those with the same ``kept`` share a run's folder."""
        changes = {"id": kept or name, "update_path": str(self._folder / f"{name}.safetensors")} | changes
        order = self._make_order(**changes)
        job = Job(
            order=order, source=self._source, directory=str(self._folder / (kept or name)),
            packed=str(self._folder / "data"), sharding=sharding,  # type: ignore[arg-type]
        )  # fmt: skip
        self._jobs[name] = {"job": asdict(job), "cut_after": cut_after}

    def run(self, world: int, device: str = "cpu") -> list[dict[str, Any]]:
        """Do them; by rank, what came of each."""
        jobs = self._folder / f"jobs-{world}-{len(list(self._folder.glob('jobs-*.json')))}.json"
        jobs.write_text(json.dumps(self._jobs))
        self._jobs = {}
        command = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
        with jobs.with_suffix(".log").open("w") as log:
            processes = [
                subprocess.Popen([*command, str(rank), str(world), str(jobs), device], stderr=log)
                for rank in range(world)
            ]
            statuses = [process.wait(800) for process in processes]
        assert statuses == [0] * world, jobs.with_suffix(".log").read_text()[-4000:]
        return [json.loads(jobs.with_suffix(f".{rank}").read_text()) for rank in range(world)]

    def same(self, one: str, other: str, tolerance: float = 2e-6) -> None:
        first, second = (load_file(self._folder / f"{name}.safetensors") for name in (one, other))
        assert list(first) == list(second)
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, atol=tolerance, rtol=0, msg=name)


@pytest.fixture
def ranks(texts: DataSource, make_order: MakeOrder, tmp_path: Path) -> Ranks:
    return Ranks(texts, make_order, tmp_path)


@pytest.fixture
def controlled(global_model: Path, tmp_path: Path) -> Path:
    add_controls(global_model, tmp_path / "controlled.safetensors")
    return tmp_path / "controlled.safetensors"


def test_two_ranks_with_half_a_model_each_do_what_one_process_does(
    ranks: Ranks, alone: Any, make_order: MakeOrder, controlled: Path, tmp_path: Path
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
    ranks: Ranks, alone: Any, make_order: MakeOrder, tmp_path: Path
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
    ranks: Ranks, alone: Any, make_order: MakeOrder, tmp_path: Path
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
