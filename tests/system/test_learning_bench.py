"""The learning benchmark's federation in one process against one of real processes."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

CONFIG = {
    "model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
TEXTS = {"site-1": "the quick brown fox jumps\n" * 40, "site-2": "over a lazy dog, again\n" * 60}
SPEC = {
    "name": "both",
    "model": {"config": CONFIG, "tokenizer": "bytes"},
    "task": {"context_tokens": 16},
    "data": "texts",
    "rounds": 3,
    "cohort": {"min_sites": 2},
    "local": {"steps": 3, "batch_examples": 4},
    "aggregation": {"deterministic": True, "server_optimizer": "diloco"},
    "transport": {"up": "int8", "down": "int8"},
    "seed": 3,
}


@pytest.mark.slow
async def test_a_trial_in_one_process_gives_the_bytes_of_a_federation_of_processes(processes, tmp_path):
    from learning.federation import federation
    from learning.workbench import Workbench

    from fedloom_client.config import DataSource
    from fedloom_common.runspec import RunSpec

    processes.coordinator()
    sites = {}
    for site, text in TEXTS.items():
        processes.site(site, {"a.txt": text})
        (tmp_path / site).mkdir()
        (tmp_path / site / "a.txt").write_text(text)
        sites[site] = {"texts": DataSource(files=(str(tmp_path / site / "*.txt"),))}
    processes.attached(2)
    run = processes.submit(SPEC)
    processes.until(lambda: processes.show(run)["run"]["state"] == "finished")
    theirs = [one["model"]["digest"] for one in processes.show(run)["rounds"]]

    bench = Workbench(device="cpu", warm=2, threads=1)
    async with federation(sites, bench, tmp_path / "federation") as running:
        ours = await running.train(RunSpec.model_validate(SPEC))
        digests = [record.model_digest for record in running.store.rounds(ours.id)]
    bench.close()
    assert len(set(digests)) == 4  # the initial model and three rounds'
    assert digests == theirs
