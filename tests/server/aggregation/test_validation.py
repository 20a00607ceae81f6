import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peaks import peak_bytes, zeros
from safetensors.torch import save_file

from fedloom_common.errors import BadTensor
from fedloom_common.floats import first_not_finite
from fedloom_server.aggregation.validation import PIECE_BYTES, validate_update

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MODEL = {"w": torch.zeros(2, 3), "steps": torch.tensor([1, 2])}


@pytest.fixture
def model(tmp_path):
    save_file(MODEL, tmp_path / "model")
    return tmp_path / "model"


def file_of(folder, tensors, name="update"):
    path = folder / name
    save_file(tensors, path)
    return path


def complaint_of(update, model):
    """Why an update is refused; nothing if it is not."""
    try:
        validate_update(update, model)
    except BadTensor as error:
        return str(error)
    return ""


def test_a_good_update_passes(tmp_path, model):
    assert not complaint_of(file_of(tmp_path, MODEL | {"w": torch.randn(2, 3)}), model)


@pytest.mark.parametrize(
    ("update", "complaint"),
    [
        pytest.param({"steps": MODEL["steps"]}, "tensor w is missing", id="missing-tensor"),
        pytest.param(
            MODEL | {"w": torch.zeros(3, 2)}, r"tensor w has shape \[3, 2\], wanted \[2, 3\]", id="shape"
        ),
        pytest.param(MODEL | {"w": torch.zeros(1, 3)}, r"tensor w has shape \[1, 3\]", id="would-broadcast"),
        pytest.param(
            MODEL | {"w": torch.zeros(2, 3).bfloat16()}, "tensor w has dtype BF16, wanted F32", id="dtype"
        ),
        pytest.param(
            MODEL | {"extra": torch.zeros(1)}, "tensor extra is not in the model", id="unknown-tensor"
        ),
    ],
)
def test_an_update_that_differs_from_the_manifest_is_refused(tmp_path, model, update, complaint):
    with pytest.raises(BadTensor, match=complaint):
        validate_update(file_of(tmp_path, update), model)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, model, content):
    (tmp_path / "update").write_bytes(content)
    with pytest.raises(BadTensor, match="not a safetensors file"):
        validate_update(tmp_path / "update", model)


def test_a_file_that_was_cut_short_is_refused(tmp_path, model):
    path = file_of(tmp_path, MODEL)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BadTensor, match="its header describes"):
        validate_update(path, model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_the_first_value_that_is_not_finite_is_named_with_its_place(tmp_path, dtype, value):
    good = {"a": torch.ones(4, dtype=dtype), "w": torch.ones(3, 5, dtype=dtype)}
    model = file_of(tmp_path, good, "model")
    good["w"][1, 4] = good["w"][2, 0] = value
    with pytest.raises(BadTensor, match=rf"tensor w holds {value} at index \[1, 4\], wanted finite values"):
        validate_update(file_of(tmp_path, good), model)


def test_a_place_beyond_the_first_piece_is_named_rightly(tmp_path):
    tensor = torch.zeros(1000, PIECE_BYTES // 400, dtype=torch.float32)
    model = file_of(tmp_path, {"w": tensor}, "model")
    tensor[987, 65] = -torch.inf
    with pytest.raises(BadTensor, match=r"-inf at index \[987, 65\]"):
        validate_update(file_of(tmp_path, {"w": tensor}), model)


def test_a_scalar_is_named_without_an_index(tmp_path):
    model = file_of(tmp_path, {"s": torch.tensor(1.0)}, "model")
    with pytest.raises(BadTensor, match=r"tensor s holds nan at index \[\]"):
        validate_update(file_of(tmp_path, {"s": torch.tensor(torch.nan)}), model)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_extreme_but_finite_values_pass(tmp_path, dtype):
    limits = torch.finfo(dtype)
    values = torch.tensor(
        [limits.max, limits.min, limits.tiny, -limits.smallest_normal / 2, -0.0, 0.0], dtype=dtype
    )
    path = file_of(tmp_path, {"w": values, "empty": torch.zeros(0, dtype=dtype)})
    assert not complaint_of(path, path)


def test_whole_numbers_may_have_any_bits(tmp_path):
    path = file_of(tmp_path, {"i": torch.tensor([-1, 2**62]), "u": torch.tensor([255], dtype=torch.uint8)})
    assert not complaint_of(path, path)


@given(st.sampled_from(list(FLOATS)), st.binary(max_size=64))
def test_any_bits_are_judged_as_torch_judges_them(dtype, content):
    content = content[: len(content) // 8 * 8]
    raw = np.frombuffer(bytearray(content), np.uint8)
    values = torch.from_numpy(raw).view(FLOATS[dtype])
    wrong = (~torch.isfinite(values)).nonzero().flatten().tolist()
    assert first_not_finite(raw, dtype) == (wrong[0] if wrong else None)


def test_memory_does_not_grow_with_the_file(tmp_path):
    assert _peak_bytes(tmp_path, 128 << 20) - _peak_bytes(tmp_path, 1 << 20) < 8 << 20


def _peak_bytes(folder, tensor_bytes):
    code = """
from fedloom_server.aggregation.validation import validate_update
validate_update(path, path)
"""
    return peak_bytes(code, zeros(folder, tensor_bytes))
