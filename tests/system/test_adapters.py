"""A federation that trains adapters: real processes, a kill in the middle, and exports loaded elsewhere."""

import json
import os
import subprocess
import sys

import pytest
from safetensors import safe_open

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SPEC = {
    "name": "adapters",
    "model": {"config": CONFIG, "tokenizer": "bytes"},
    "task": {"context_tokens": 32},
    "data": "texts",
    "rounds": 12,
    "cohort": {"min_sites": 2},
    "local": {"steps": 6, "batch_examples": 8, "optimizer": {"lr": 0.01}, "checkpoint_every": 2},
    "evaluation": {"when": "after_round"},
}
LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, merged, adapter = sys.argv[1:]
tokens = AutoTokenizer.from_pretrained(merged)("jumps over a lazy dog", return_tensors="pt").input_ids
with torch.no_grad():
    before = AutoModelForCausalLM.from_pretrained(base)
    first = before(input_ids=tokens).logits
    whole = AutoModelForCausalLM.from_pretrained(merged)(input_ids=tokens).logits
    with_adapter = PeftModel.from_pretrained(before, adapter).eval()(input_ids=tokens).logits
print(float((whole - with_adapter).abs().max()), float((whole - first).abs().max()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["fedex", "ffa", "fedit", "stack"])
def test_adapters_learn_through_a_kill_and_both_exports_are_one_model_elsewhere(processes, merge, tmp_path):
    if not processes.running:
        processes.coordinator("--keep-models", "50")
        processes.site("red", {"a.txt": "the quick brown fox " * 200}, "--workers.nproc-per-node", "2")
        processes.site("green", {"b.txt": "jumps over a lazy dog; " * 200})
    processes.attached(2)
    adapter = {"rank": 4, "target_modules": "all-linear", "merge": merge}
    if merge == "stack":
        adapter["ranks"] = {"green": 2}
    run = processes.submit(SPEC | {"name": merge, "model": SPEC["model"] | {"adapter": adapter}})
    processes.until(lambda: processes.show(run)["run"].get("rounds_done", 0) >= 1)
    processes.kill("coordinator")
    processes.coordinator("--keep-models", "50")
    processes.until(lambda: processes.show(run)["run"]["state"] == "finished", 200)
    losses = [record["metrics"]["loss"] for record in processes.show(run)["rounds"]]
    assert losses[-1] < losses[0]
    folders = [str(tmp_path / name) for name in ("base", "merged", "adapter")]
    processes("run", "export", run, "--round", "0", "--to", folders[0])
    processes("run", "export", run, "--to", folders[1])
    processes("run", "export", run, "--adapter", "--base", folders[0], "--to", folders[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, *folders],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    apart, learned = map(float, done.stdout.split())
    assert learned > 0.1
    assert apart < 1e-4 * learned + 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == folders[0]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "numpy") as file:
        ranks = {file.get_slice(name).get_shape()[0] for name in file.keys() if "lora_A" in name}  # noqa: SIM118
    assert ranks == {config["r"]}
    assert (config["r"] == 4) == (merge in ("ffa", "fedit"))
