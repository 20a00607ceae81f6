import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom_common.codecs.topk import Picker, find_threshold, gaps_of, indices_of, kept
from fedloom_common.errors import BadTensor


@pytest.mark.parametrize(
    ("values", "fraction", "wanted"),
    [(1000, 0.01, 10), (1001, 0.01, 11), (5, 0.01, 1), (7, 1.0, 7), (3, 0.5, 2)],
)
def test_k_is_the_fraction_rounded_up_and_never_none(values, fraction, wanted):
    assert kept(values, fraction) == wanted


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
PIECES = st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45]) | FLOATS, max_size=30), min_size=1)


@given(PIECES, st.data())
def test_exactly_the_k_largest_are_picked_of_equals_the_first(lists, data):
    pieces = [np.asarray(values, np.float32) for values in lists]
    whole = np.concatenate(pieces)
    if not len(whole):
        return
    keep = data.draw(st.integers(1, len(whole)))
    picker = Picker(find_threshold(lambda: iter(pieces), keep))
    starts = np.cumsum([0] + [len(piece) for piece in pieces])
    picked = np.concatenate(
        [picker.pick(piece) + start for piece, start in zip(pieces, starts, strict=False)]
    )
    wanted = np.sort(np.argsort(-np.abs(whole), kind="stable")[:keep])
    assert picked.tolist() == wanted.tolist()


def test_a_long_run_of_pieces_is_counted_above_the_floor_only():
    """The histogram passes over what is beaten already: the result may not depend on the order of pieces."""
    random = np.random.default_rng(0)
    pieces = [random.standard_normal(1000).astype(np.float32) * scale for scale in (1, 3, 0.1, 10, 2)]
    for order in (pieces, pieces[::-1]):
        whole = np.sort(np.abs(np.concatenate(order)))[::-1]
        threshold = find_threshold(lambda order=order: iter(order), 37)
        assert np.uint32(threshold.bits).view(np.float32) == whole[36]
        assert threshold.ties == 1


def test_gaps_by_hand():
    assert gaps_of(np.array([0, 1, 5, 65535])).tolist() == [0, 0, 3, 65529]
    assert indices_of(np.array([0, 0, 3, 65529], np.uint16), 65536).tolist() == [0, 1, 5, 65535]


def test_gaps_that_lead_out_of_the_piece_are_refused():
    with pytest.raises(BadTensor, match="the gaps lead to value 10 of a piece of 10"):
        indices_of(np.array([4, 5], np.uint16), 10)
