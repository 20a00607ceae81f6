"""The schedule by hand, and the state that outlives a process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedloom_client.training.group import Group
from fedloom_client.training.optimizers import KeptState, new_optimizer, rate_factor
from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import SGD, AdamW, Schedule

ALONE = Group(0, 1, torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        pytest.param(Schedule(warmup_steps=4), 0, 0.2, id="warm-up-begins-above-zero"),
        pytest.param(Schedule(warmup_steps=4), 3, 0.8, id="warm-up"),
        pytest.param(Schedule(warmup_steps=4), 4, 1.0, id="peak"),
        pytest.param(Schedule(warmup_steps=4, final_ratio=0.1), 52, 0.55, id="half-way"),
        pytest.param(Schedule(warmup_steps=4, final_ratio=0.1), 100, 0.1, id="end"),
        pytest.param(Schedule(warmup_steps=4, final_ratio=0.1), 170, 0.1, id="after-the-end"),
        pytest.param(Schedule(kind="constant", warmup_steps=4), 2, 0.6, id="constant-warms-up"),
        pytest.param(Schedule(kind="constant"), 99, 1.0, id="constant"),
    ],
)
def test_learning_rate_over_the_run(schedule: Schedule, step: int, expected: float) -> None:
    assert rate_factor(schedule, step, 100) == pytest.approx(expected)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("spec", [AdamW(lr=0.1), SGD(momentum=0.9)], ids=["adamw", "sgd-momentum"])
def test_a_restored_optimizer_takes_the_same_steps(spec: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, kept = nn.Linear(3, 2), KeptState(tmp_path)
    optimizer = new_optimizer(spec, module)
    step(module, optimizer, 1)
    kept.save(optimizer, module, 1, ALONE)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(module.state_dict())
    restored = new_optimizer(spec, twin)
    kept.load(restored, twin, 2)
    for seed in (2, 3):
        step(module, optimizer, seed)
        step(twin, restored, seed)
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_the_newest_two_rounds_and_none_of_an_abandoned_future_are_kept(tmp_path: Path) -> None:
    module, kept = nn.Linear(3, 2), KeptState(tmp_path)
    optimizer = new_optimizer(AdamW(), module)
    step(module, optimizer, 1)
    for round_ in (1, 2, 3, 9, 4):
        kept.save(optimizer, module, round_, ALONE)
    assert {file.name for file in tmp_path.iterdir()} == {
        "optimizer-3.safetensors",
        "optimizer-4.safetensors",
    }


def test_plain_sgd_keeps_no_file(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    optimizer = new_optimizer(SGD(), module)
    step(module, optimizer, 1)
    KeptState(tmp_path).save(optimizer, module, 1, ALONE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_state_file_that_cannot_be_used_is_named(tmp_path: Path, damage: str) -> None:
    module, kept = nn.Linear(3, 2), KeptState(tmp_path)
    optimizer = new_optimizer(AdamW(), module)
    step(module, optimizer, 1)
    kept.save(optimizer, module, 1, ALONE)
    file = tmp_path / "optimizer-1.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        module = nn.Sequential(module)
    with pytest.raises(TrainingFailed, match=r"optimizer-1\.safetensors cannot be used .*: delete it"):
        kept.load(new_optimizer(AdamW(), module), module, 2)
