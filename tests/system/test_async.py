"""An asynchronous run over real processes and certificates: kills cost nobody else anything."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

PACED_SITE = Path(__file__).with_name("pacedsite.py")
SITES = {"brisk": (1.0, 10, 0.1), "quick": (2.0, 30, 0.2), "slow": (4.0, 20, 2.0)}
"""Step, examples and seconds of each site's training."""
SPEC = {
    "name": "paces",
    "model": {
        "config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32},
        "tokenizer": "bytes",
    },
    "task": {"context_tokens": 16},
    "data": "texts",
    "rounds": 40,
    "mode": {"kind": "async", "buffer": 2, "staleness": {"exponent": 0.5, "max": 40}},
    "cohort": {"min_sites": 3},
    "local": {"steps": 100, "batch_examples": 1},
    "transport": {"up": "zstd"},
    "evaluation": {"every_rounds": 0, "initial": False},
}


@pytest.mark.slow
def test_versions_go_on_while_sites_and_the_coordinator_are_killed(processes):
    processes.coordinator("--keep-models", "100")
    for name in SITES:
        processes("provision", "site", name)
        data = processes.kit / "sites" / name / "data"
        data.mkdir(exist_ok=True)
        (data / "a.txt").write_text("to be or not to be")
        start(processes, name)
    processes.attached(3)
    run = processes.submit(SPEC)
    for count, victim in enumerate(["slow", "quick", "coordinator"], start=1):
        processes.until(lambda count=count: versions_of(processes, run) >= 5 * count)
        processes.kill(victim, signal.SIGKILL)
        if victim == "coordinator":
            processes.coordinator("--keep-models", "100")
        else:
            start(processes, victim)
    processes("run", "watch", run)
    rounds = processes.show(run)["rounds"]
    assert [item["number"] for item in rounds] == list(range(1, 41))
    require_models_by_hand(processes, rounds)
    counted = {work["site"] for item in rounds for work in item["sites"] if work["state"] == "done"}
    assert counted == set(SITES)
    assert set(processes.stop().values()) == {0}


def start(processes, name):
    config = processes.kit / "sites" / name / "site.yaml"
    processes.spawn(name, sys.executable, PACED_SITE, *map(str, SITES[name]), config)


def versions_of(processes, run):
    return int(processes.show(run)["run"].get("rounds_done", 0))


def require_models_by_hand(processes, rounds):
    """Each version is the one before and its updates' steps, weighted by examples and staleness."""
    files = processes.kit / "coordinator/state/files"
    before = None
    for item in rounds:
        model = load_file(files / item["model"]["digest"].replace(":", "-"))
        taken = [work for work in item["sites"] if work["state"] == "done"]
        assert len(taken) == 2
        examples = sum(int(work["examples"]) for work in taken)
        step = sum(
            int(work["examples"]) * (1 + work.get("staleness", 0)) ** -0.5 * SITES[work["site"]][0]
            for work in taken
        )
        for name, tensor in model.items():
            if before is not None:
                np.testing.assert_allclose(tensor, before[name] + step / examples, rtol=1e-5, atol=1e-5)
        before = model
