"""Control variates that join a model's file and leave it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedloom_common.controls import add_controls, drop_controls, has_controls
from fedloom_common.tensors import Manifest, write_tensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(5, dtype=torch.bfloat16),
        "b": torch.randn(700, 600),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(2.5),
        "steps": torch.tensor([7, 9]),
    }
    write_tensors(tmp_path / "model.safetensors", tensors, {"origin": "round 3"})
    return tmp_path / "model.safetensors"


def test_every_float_tensor_gets_an_fp32_control_variate_of_zeros(model: Path, tmp_path: Path) -> None:
    add_controls(model, tmp_path / "out")
    before, after = load_file(model), load_file(tmp_path / "out")
    for name, tensor in before.items():
        assert torch.equal(after.pop(name), tensor)
    assert set(after) == {"control/a", "control/b", "control/empty", "control/number"}
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.zeros(before[name.removeprefix("control/")].shape))
    with safe_open(tmp_path / "out", "pt") as file:
        assert file.metadata() == {"format": "pt", "origin": "round 3"}


def test_each_tensor_begins_at_a_multiple_of_its_elements_size(model: Path, tmp_path: Path) -> None:
    add_controls(model, tmp_path / "out")
    sizes = {"BF16": 2, "F32": 4, "I64": 8}
    for info in Manifest.read(tmp_path / "out").tensors:
        assert info.start_bytes % sizes[info.dtype] == 0


def test_a_model_without_its_control_variates_is_what_it_was(model: Path, tmp_path: Path) -> None:
    add_controls(model, model)
    assert has_controls(model)
    drop_controls(model, tmp_path / "plain")
    assert not has_controls(tmp_path / "plain")
    torch.manual_seed(0)
    assert torch.equal(load_file(tmp_path / "plain")["a"], torch.randn(5, dtype=torch.bfloat16))
    assert set(load_file(tmp_path / "plain")) == {"a", "b", "empty", "number", "steps"}


def test_a_file_of_another_maker_is_taken_too(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "theirs")
    add_controls(tmp_path / "theirs", tmp_path / "theirs")
    assert load_file(tmp_path / "theirs")["control/w"].tolist() == [0, 0, 0]
