import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom_common.codecs.values import Float, Int4, Int8
from fedloom_common.errors import BadTensor
from fedloom_common.floats import magnitude


def coded(codec, values):
    values = np.asarray(values, np.float32)
    raws = [np.zeros(part.size_bytes(len(values)), np.uint8) for part in codec.parts]
    codec.encode(values, raws)
    return raws


def decoded(codec, raws, count):
    values = np.empty(count, np.float32)
    codec.decode(raws, values)
    return values


def test_int8_by_hand():
    values = [127.0, -127.0, 63.4, 0.0] + [0.0] * 12 + [-2.54, 1.27, 0.02, 0.0]
    raws = coded(Int8(16), values)
    assert raws[1].view("<f4").tolist() == [1.0, np.float32(2.54) / np.float32(127)]
    assert raws[0].view(np.int8).tolist() == [127, -127, 63, 0] + [0] * 12 + [-127, 64, 1, 0]
    assert decoded(Int8(16), raws, 20)[:4].tolist() == [127.0, -127.0, 63.0, 0.0]


def test_a_half_goes_to_the_even_step():
    raws = coded(Int8(16), [127.0, 0.5, 1.5, -0.5, -2.5])
    assert raws[0].view(np.int8).tolist() == [127, 0, 2, 0, -2]


def test_int4_by_hand_first_half_low_second_half_high():
    raws = coded(Int4(16), [7.0, -7.0, 3.2, 0.0, 1.0])
    assert raws[1].view("<f4").tolist() == [1.0]
    assert raws[0].tolist() == [15 | 8 << 4, 1 | 9 << 4, 11]  # steps plus 8: 15, 1, 11 and 8, 9
    assert decoded(Int4(16), raws, 5).tolist() == [7.0, -7.0, 3.0, 0.0, 1.0]


@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**127), max_value=2.0**127), min_size=1))
def test_bf16_is_rounded_as_torch_rounds(values):
    wanted = torch.tensor(values).bfloat16()
    raws = coded(Float("BF16"), values)
    assert raws[0].view(np.int16).tolist() == wanted.view(torch.int16).tolist()
    assert decoded(Float("BF16"), raws, len(values)).tolist() == wanted.float().tolist()


@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-65519, max_value=65519), min_size=1))
def test_fp16_is_rounded_as_torch_rounds(values):
    wanted = torch.tensor(values).half()
    raws = coded(Float("F16"), values)
    assert raws[0].view(np.int16).tolist() == wanted.view(torch.int16).tolist()
    assert decoded(Float("F16"), raws, len(values)).tolist() == wanted.float().tolist()


@pytest.mark.parametrize(
    ("codec", "value"),
    [(Float("F16"), 65520.0), (Float("F16"), -1e6), (Float("BF16"), 3.4e38)],
    ids=["fp16", "fp16-negative", "bf16"],
)
def test_a_value_beyond_the_types_range_is_told(codec, value):
    with pytest.raises(BadTensor, match=r"the change at 2 is .*, beyond B?F16's range"):
        coded(codec, [1.0, -2.0, value])


@pytest.mark.parametrize(
    "codec",
    [Float("F32"), Float("BF16"), Float("F16"), Int8(16), Int4(16)],
    ids=["fp32", "bf16", "fp16", "int8", "int4"],
)
@given(st.lists(st.floats(width=32, min_value=-6e4, max_value=6e4), min_size=1, max_size=50))
def test_no_value_exceeds_the_limit(codec, values):
    raws = coded(codec, values)
    assert np.abs(decoded(codec, raws, len(values))).max() <= codec.limit(raws)


@pytest.mark.parametrize("scale", [-1.0, np.nan, np.inf])
def test_a_scale_that_is_no_scale_is_refused(scale):
    raws = coded(Int8(16), np.ones(40))
    raws[1].view("<f4")[1] = scale
    with pytest.raises(BadTensor, match=f"a scale is {scale}, wanted a finite number of 0 or more"):
        Int8(16).limit(raws)


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_the_magnitude_is_the_largest_absolute_value(values):
    array = np.asarray(values, np.float32)
    assert magnitude(array.view(np.uint8), "F32") == (np.abs(array).max() if values else 0)


@pytest.mark.parametrize("value", [np.nan, -np.nan, -np.inf])
def test_the_magnitude_of_what_is_not_finite_is_not_finite(value):
    array = np.asarray([1.0, value, -3.0], np.float32)
    assert not np.isfinite(magnitude(array.view(np.uint8), "F32"))
