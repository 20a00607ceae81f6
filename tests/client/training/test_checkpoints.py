"""A training that was cut short and goes on from its checkpoint, against one that never stopped."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedloom_client.training.checkpoints import Checkpoint
from fedloom_client.training.models import LocalModel
from fedloom_client.training.orders import CHECKPOINT, Cancelled, Order, WorkerProgress
from fedloom_common.errors import TrainingFailed

MakeOrder = Callable[..., Order]
ADAMW = {"name": "adamw", "lr": 1e-2}
MOMENTUM = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
PLAIN = {"name": "sgd", "lr": 0.1}


class Killed(BaseException):
    """The process ends here."""


def stop_after(alone: Any, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Have the process killed in the step after so many."""
    taken, real = 0, torch.optim.Optimizer.zero_grad

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        nonlocal taken
        taken += 1
        if taken > steps:
            raise Killed
        real(self, set_to_none)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", zero_grad)


def cancel_after_a_checkpoint(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Checkpoint.save

    def save(self: Checkpoint, losses: list[float]) -> None:
        real(self, losses)
        alone.stop_wanted = True

    monkeypatch.setattr(Checkpoint, "save", save)


def dropping_out(assets: Path, folder: Path) -> Path:
    """The same model with dropout, which every training step draws from the generator."""
    folder.mkdir()
    for file in assets.iterdir():
        text = file.read_text()
        (folder / file.name).write_text(text.replace('"resid_pdrop": 0', '"resid_pdrop": 0.3'))
    return folder


@pytest.mark.parametrize("optimizer", [ADAMW, MOMENTUM, PLAIN], ids=["adamw", "momentum", "plain-sgd"])
def test_a_training_killed_between_checkpoints_ends_with_the_bytes_of_an_undisturbed_one(
    alone: Any, make_order: MakeOrder, assets: Path, optimizer: Any, tmp_path: Path
) -> None:
    local = {"steps": 9, "checkpoint_every": 3, "optimizer": optimizer}
    folder = str(dropping_out(assets, tmp_path / "dropout"))
    undisturbed = str(tmp_path / "undisturbed")
    expected = alone.perform(
        make_order(id="undisturbed", local=local, assets_dir=folder, update_path=undisturbed)
    )

    alone.restart()
    order = make_order(local=local, assets_dir=folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_after(alone, patch, steps=7)
        alone.perform(order)
    assert len(load_file(alone.directory / CHECKPOINT)["losses"]) == 6
    alone.restart()
    alone.progress.clear()
    result = alone.perform(order)

    assert WorkerProgress(phase="train", done=6, total=9) in alone.progress
    assert Path(order.update_path).read_bytes() == Path(undisturbed).read_bytes()
    assert result.metrics == expected.metrics
    assert (result.examples, result.tokens) == (expected.examples, expected.tokens)


def test_an_order_that_was_done_goes_on_from_its_last_checkpoint_if_it_comes_again(
    alone: Any, make_order: MakeOrder
) -> None:
    order = make_order(local={"steps": 9, "checkpoint_every": 3, "optimizer": ADAMW})
    expected = alone.perform(order)
    update = Path(order.update_path).read_bytes()
    Path(order.update_path).unlink()
    alone.restart()
    alone.progress.clear()
    result = alone.perform(order)
    assert WorkerProgress(phase="train", done=6, total=9) in alone.progress
    assert Path(order.update_path).read_bytes() == update
    assert (result.metrics, result.tokens) == (expected.metrics, expected.tokens)
    alone.perform(make_order(round_=2, local={"checkpoint_every": None}))
    assert not (alone.directory / CHECKPOINT).exists()


def test_without_checkpoint_every_nothing_is_written(alone: Any, make_order: MakeOrder) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_after(alone, patch, steps=3)
        alone.perform(make_order())
    assert not (alone.directory / CHECKPOINT).exists()


def test_a_checkpoint_of_another_order_is_not_used(alone: Any, make_order: MakeOrder, tmp_path: Path) -> None:
    local = {"checkpoint_every": 2, "keep_optimizer_state": False}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_after(alone, patch, steps=3)
        alone.perform(make_order(local=local, id="first-attempt"))
    alone.restart()
    alone.progress.clear()
    alone.perform(make_order(local=local, id="second-attempt"))
    assert WorkerProgress(phase="train", done=0, total=4) in alone.progress


def test_a_cancelled_training_goes_on_if_the_same_order_comes_again(
    alone: Any, make_order: MakeOrder
) -> None:
    order = make_order(local={"steps": 6, "checkpoint_every": 2})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cancelled):
        cancel_after_a_checkpoint(alone, patch)
        alone.perform(order)
    alone.stop_wanted = False
    alone.progress.clear()
    assert alone.perform(order).examples == 6 * 8
    assert WorkerProgress(phase="train", done=2, total=6) in alone.progress


def test_a_damaged_checkpoint_costs_the_steps_and_not_the_round(
    alone: Any, make_order: MakeOrder, caplog: pytest.LogCaptureFixture
) -> None:
    order = make_order(local={"checkpoint_every": 2})
    alone.directory.mkdir(parents=True)
    (alone.directory / CHECKPOINT).write_bytes(b"\x20\0\0\0\0\0\0\0no header at all")
    with caplog.at_level(logging.WARNING):
        assert alone.perform(order).examples == 4 * 8
    assert "the local checkpoint is damaged" in caplog.text


def test_a_checkpoint_of_another_model_says_what_to_do(alone: Any, make_order: MakeOrder) -> None:
    order = make_order(local={"checkpoint_every": 2})
    alone.directory.mkdir(parents=True)
    tensors = {"losses": torch.zeros(2, dtype=torch.float64), "model/unknown": torch.zeros(1)}
    save_file(tensors, alone.directory / CHECKPOINT, {"order": order.id, "world": "1"})
    with pytest.raises(TrainingFailed, match=r"checkpoint\.safetensors cannot be used .*delete it"):
        alone.perform(order)


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    alone: Any, make_order: MakeOrder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        if CHECKPOINT in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        result = alone.perform(make_order(local={"checkpoint_every": 2}))
    assert result.examples == 4 * 8
    assert [record.message for record in caplog.records].count("no local checkpoint") == 1


def test_a_loss_that_is_not_finite_never_gets_into_a_checkpoint(
    alone: Any, make_order: MakeOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[list[float]] = []
    monkeypatch.setattr(
        "fedloom_client.training.checkpoints.write_tensors",
        lambda path, tensors, marks: saved.append(tensors["losses"].tolist()),
    )
    real = LocalModel.load

    def load(self: LocalModel, path: Path) -> None:
        real(self, path)
        with torch.no_grad():
            next(self.module.parameters()).fill_(float("nan"))

    monkeypatch.setattr(LocalModel, "load", load)
    with pytest.raises(TrainingFailed, match="the loss is nan at step 1"):
        alone.perform(make_order(local={"checkpoint_every": 1}))
    assert saved == []
