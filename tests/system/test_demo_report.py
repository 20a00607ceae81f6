"""What the demo makes of a run's rounds."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

PLACE = Path(__file__).parents[2] / "examples/shakespeare/report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = spec_from_file_location("report", PLACE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sites_loss_stands_with_the_round_whose_model_it_measured(report: ModuleType) -> None:
    trainings = [
        {"site": site, "work": "train", "state": "done", "metrics": {"loss": 9.0},
         "before": {"metrics": {"loss": loss}}, "before_round": 0}
        for site, loss in (("tragedies", 5.0), ("comedies", 5.5))
    ]  # fmt: skip
    last = [
        {"site": site, "work": "evaluate", "state": "done", "metrics": {"loss": loss}, "before_round": 0}
        for site, loss in (("tragedies", 2.0), ("comedies", 2.5))
    ]
    shown = {
        "rounds": [
            {"number": 0, "metrics": {"loss": 5.2}, "sites": []},
            {"number": 1, "metrics": {"loss": 2.2, "train_loss": 9.0}, "sites": [*trainings, *last]},
        ]
    }
    assert report.losses(shown) == {
        0: {"comedies": 5.5, "tragedies": 5.0, "overall": 5.2},
        1: {"comedies": 2.5, "tragedies": 2.0, "overall": 2.2},
    }
