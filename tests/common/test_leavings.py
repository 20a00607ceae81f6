import pytest
import torch

from fedloom_common.errors import BadTensor, WrongState
from fedloom_common.leavings import Leavings
from fedloom_common.tensors import read_tensors, write_tensors


@pytest.fixture
def leavings(tmp_path):
    return Leavings(tmp_path)


def prepare(leavings, round_):
    marks = leavings.marks(f"update-{round_}", round_)
    write_tensors(leavings.prepared, {"round": torch.tensor(float(round_))}, marks)


def delivered(leavings, round_):
    prepare(leavings, round_)
    leavings.deliver(f"update-{round_}")


def kept_round(leavings):
    """The round that left what the next update begins from; 0 for none."""
    return int(dict(read_tensors(leavings.kept))["round"]) if leavings.kept.exists() else 0


@pytest.mark.parametrize(
    ("round_", "counted_round", "kept"),
    [
        pytest.param(3, 2, 2, id="it-counted"),
        pytest.param(3, 1, 1, id="it-did-not"),
        pytest.param(2, 1, 1, id="tried-again"),
        pytest.param(3, 5, 2, id="what-the-counted-one-left-is-lost"),
        pytest.param(3, None, 2, id="not-told"),
        pytest.param(2, None, 1, id="not-told-but-tried-again"),
    ],
)
def test_what_a_delivered_update_left_stays_if_it_counted(leavings, round_, counted_round, kept):
    delivered(leavings, 1)
    leavings.settle(2, 1)
    delivered(leavings, 2)
    assert leavings.settle(round_, counted_round) is (kept == 2)
    assert kept_round(leavings) == kept
    assert leavings.settle(round_, counted_round)
    assert [path.name for path in leavings.kept.parent.iterdir()] == ["kept.safetensors"]


def test_a_first_update_that_did_not_count_leaves_nothing(leavings):
    delivered(leavings, 1)
    assert not leavings.settle(2, 0)
    assert list(leavings.kept.parent.iterdir()) == []


def test_a_delivery_that_is_told_again_changes_nothing(leavings):
    delivered(leavings, 1)
    leavings.deliver("update-1")
    leavings.settle(2, 1)
    leavings.deliver("update-1")
    assert kept_round(leavings) == 1
    with pytest.raises(WrongState, match="nothing is prepared for update update-2"):
        leavings.deliver("update-2")


def test_what_is_delivered_outlives_that_the_update_is_forgotten(leavings):
    delivered(leavings, 1)
    leavings.discard("update-1")
    leavings.settle(2, 1)
    assert kept_round(leavings) == 1


def test_a_damaged_file_is_told_once_and_stands_in_nobodys_way(leavings):
    leavings.delivered.write_bytes(b"what a power cut left")
    with pytest.raises(BadTensor):
        leavings.settle(2, 1)
    assert leavings.settle(2, 1)
