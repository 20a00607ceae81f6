"""The figures of benchmarks/training.py, by hand."""

import json
import subprocess
import sys

import pytest
import training
from training import OURS, PEER, PLAIN, Figures, utilisation


@pytest.fixture
def figures():
    return Figures(
        model="small",
        ranks=2,
        tokens=1000,
        seconds={OURS: [2.0, 4.0, 1.0], PLAIN: [3.0, 4.0, 0.5], PEER: [4.0, 4.0, 4.0]},
        cpu_seconds={OURS: [1.0, 1.0, 1.0], PLAIN: [1.1, 1.2, 1.3], PEER: [2.0, 1.0, 3.0]},
        flops=9e11,
    )


def test_speeds_are_medians_and_ratios_those_of_turns_that_followed_each_other(figures):
    assert figures.tokens_per_s(OURS) == 500
    assert figures.ratio(PLAIN, figures.seconds) == 1.0  # of 1.5, 1 and 0.5
    assert figures.ratio(PEER, figures.seconds) == 2.0  # of 2, 1 and 4
    assert figures.ratio(PLAIN, figures.cpu_seconds) == 1.2


def test_utilisation_is_of_all_devices_and_not_told_of_unknown_ones(figures):
    assert utilisation(figures, "NVIDIA A100-SXM4-80GB") == f"{500 * 9e11 / (2 * 312e12):.2f}"
    assert utilisation(figures, "cpu") == ""
    assert utilisation(figures, "NVIDIA L40") == ""  # which is no L4


@pytest.mark.slow
def test_trainers_of_two_ranks_take_their_turns_and_end(tmp_path):
    options = ["--models", "small", "--ranks", "2", "--turns", "1", "--no-peer", "--json", tmp_path / "out"]
    subprocess.run([sys.executable, training.__file__, *options], check=True, timeout=240)
    (case,) = json.loads((tmp_path / "out").read_text())["cases"]
    assert len(case["seconds"][OURS]) == len(case["seconds"][PLAIN]) == 1
