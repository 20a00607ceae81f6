"""Claims about a whole federation: real processes, real certificates, real training."""

import json
import os
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT, BATCH = 16, 8
TRAIN_TOKENS = CONTEXT * BATCH
WORDS = {
    "red": "the quick brown fox ",
    "green": "jumps over a lazy dog; ",
    "blue": "colourless ideas sleep, ",
}
CONFIG = {
    "model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def text_of(site: str) -> str:
    """Text whose first nine tenths and an end-of-text token fill BATCH examples."""
    length = next(
        n
        for n in range(TRAIN_TOKENS, 2 * TRAIN_TOKENS)
        if n - round(n * 0.1) == TRAIN_TOKENS - 1 + CONTEXT // 2
    )
    return (WORDS[site] * 20)[:length]


def spec_of(name: str, **changes: object) -> dict:
    return {
        "name": name,
        "model": {"config": CONFIG, "tokenizer": "bytes"},
        "task": {"context_tokens": CONTEXT},
        "data": "texts",
        "rounds": 1,
        "cohort": {"min_sites": 3},
        "local": {
            "steps": 1,
            "batch_examples": BATCH,
            "optimizer": {"name": "sgd", "lr": 0.5},
            "schedule": {"kind": "constant"},
            "clip_norm": None,
        },
        "seed": 3,
    } | changes


@pytest.fixture(scope="module")
def federation(processes):
    processes.coordinator("--keep-models", "50")
    processes.site("red", {"a.txt": text_of("red")}, "--workers.nproc-per-node", "2")
    processes.site("green", {"b.txt": text_of("green")}, "--policy.max-steps-per-round", "100")
    processes.site("blue", {"c.txt": text_of("blue")})
    processes.attached(3)
    return processes


def test_one_round_of_one_sgd_step_equals_one_centralised_step(federation, tmp_path):
    run = federation.submit(spec_of("one-step"))
    federation("run", "watch", run)
    federation("run", "export", run, "--round", "0", "--to", str(tmp_path / "before"))
    federation("run", "export", run, "--to", str(tmp_path / "after"))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "before")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before").train()
    blocks = [tokenizer(text_of(site))["input_ids"][:TRAIN_TOKENS] for site in WORDS]
    examples = torch.tensor(blocks).reshape(-1, CONTEXT)
    model(examples, labels=examples).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad

    after = load_file(tmp_path / "after" / "model.safetensors")
    central = model.state_dict()
    assert len(after) >= 25
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, central[name], rtol=0, atol=1e-6)
    before = load_file(tmp_path / "before" / "model.safetensors")
    assert any((after[name] - tensor).abs().max() > 1e-3 for name, tensor in before.items())


@pytest.mark.slow
def test_scaffolds_control_variates_are_the_mean_gradient_and_no_export_has_them(federation, tmp_path):
    """One step from the initial model: the model moves by the learning rate times what c becomes."""
    local = spec_of("")["local"] | {"algorithm": "scaffold"}
    run = federation.submit(spec_of("scaffold", rounds=2, local=local))
    federation("run", "watch", run)
    exported = []
    for round_ in ("0", "1", "2"):
        federation("run", "export", run, "--round", round_, "--to", str(tmp_path / round_))
        exported.append(load_file(tmp_path / round_ / "model.safetensors"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "2")
    digest = federation.show(run)["rounds"][1]["model"]["digest"]
    (stored,) = (federation.kit / "coordinator").rglob(f"*{digest.removeprefix('blake3:')}*")
    held = load_file(stored)
    assert set(held) == {*exported[1], *(f"control/{name}" for name in exported[1])}
    for name, tensor in exported[1].items():
        expected = (exported[0][name] - tensor) / 0.5
        torch.testing.assert_close(held[f"control/{name}"], expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def learnt(federation):
    """A run of two rounds that has ended; each site trained alone as well."""
    local = {"steps": 4, "batch_examples": 4, "optimizer": {"lr": 0.003}}
    run = federation.submit(spec_of("adam", rounds=2, local=local, evaluation={"alone": True}))
    federation("run", "watch", run)
    return run


def test_the_loss_that_sites_report_is_that_of_the_exported_model(federation, learnt, tmp_path):
    shown = federation.show(learnt)
    first, last = shown["rounds"][0]["metrics"], shown["rounds"][-1]["metrics"]
    assert last["loss"] < first["loss"]
    federation("run", "export", learnt, "--to", str(tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    held_out = []
    for site in WORDS:
        tokens = tokenizer(text_of(site))["input_ids"]
        tail = [*tokens[-round(len(tokens) * 0.1) :], tokenizer.eos_token_id]
        held_out.append(tail[: len(tail) // CONTEXT * CONTEXT])
    examples = torch.tensor(held_out).reshape(-1, CONTEXT)
    with torch.no_grad():
        loss = model(examples, labels=examples).loss.item()
    assert last["loss"] == pytest.approx(loss, abs=1e-5)
    card = (tmp_path / "model" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert all(site in card for site in WORDS)


def test_the_report_compares_each_site_with_its_own_training(federation, learnt):
    report = json.loads(federation("run", "report", learnt, "--json"))
    assert [site["site"] for site in report["sites"]] == sorted(WORDS)
    assert sum(site["data_share"] for site in report["sites"]) == pytest.approx(1)
    shown = json.loads(federation("run", "show", learnt, "--sites", "--json"))
    for site in report["sites"]:
        known = {number: told["metrics"]["loss"] for number, told in shown[site["site"]]["rounds"].items()}
        assert set(known) == {"0", "1", "2"}
        assert (site["initial"], site["federated"]) == (known["0"], known["2"])
        assert site["alone"] < site["initial"]
        assert site["gain"] == pytest.approx(site["alone"] - site["federated"])
        assert site["worth_joining"] == (site["gain"] > 0)
    assert "worth joining" in federation("run", "report", learnt)


def test_int8_both_ways_learns_with_less_than_a_third_of_the_bytes(federation):
    spec = spec_of("codecs", rounds=3, transport={"up": "int8", "down": ["int8", "zstd"]})
    spec["model"] = {"config": CONFIG | {"n_embd": 64}, "tokenizer": "bytes"}
    spec["local"] = {"steps": 8, "batch_examples": 4, "optimizer": {"lr": 0.003}}
    run = federation.submit(spec)
    federation("run", "watch", run)
    shown = federation.show(run)
    losses = [entry["metrics"]["loss"] for entry in shown["rounds"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    model_bytes = int(shown["run"]["model"]["size_bytes"])
    for entry in shown["rounds"][1:]:
        for site in entry["sites"]:
            way = "bytes_up" if site["work"] == "train" else "bytes_down"
            assert 0 < int(site[way]) < model_bytes / 3, (entry["number"], site)
            assert site["state"] == "done"


@pytest.mark.slow
def test_a_site_refuses_what_its_policy_does_not_permit(federation):
    spec = spec_of("greedy", cohort={"min_sites": 3, "quorum": 2})
    spec["local"] |= {"steps": 101}
    spec["local"]["batch_examples"] = 2
    run = federation.submit(spec)
    federation("run", "watch", run)
    sites = {s["site"]: s for s in federation.show(run)["rounds"][1]["sites"] if s["work"] == "train"}
    assert sites["green"]["state"] == "refused"
    assert "max_steps_per_round" in sites["green"]["reason"]
    assert [sites[name]["state"] for name in ("red", "blue")] == ["done", "done"]


@pytest.mark.slow
def test_a_spec_that_no_site_can_do_waits_with_every_sites_cause(federation):
    spec = spec_of("odd", cohort={"min_sites": 3, "attempts": 1}, evaluation={"initial": False})
    spec["local"] |= {"batch_examples": 7}
    run = federation.submit(spec)
    federation.until(lambda: "reported" in federation.show(run)["run"]["reason"])
    federation("run", "watch", run, "--exit-when-waiting", status=4)
    reason = federation.show(run)["run"]["reason"]
    federation("run", "stop", run)
    assert "the quorum is 3" in reason
    assert "red failed" in reason
    assert "7" in reason


def test_a_killed_coordinator_and_a_killed_site_finish_the_run(federation):
    local = {"steps": 100, "batch_examples": 4, "optimizer": {"lr": 0.003}}
    run = federation.submit(spec_of("killed", rounds=3, local=local))
    federation.until(lambda: federation.show(run)["run"]["rounds_done"] >= 1)
    federation.kill("coordinator")
    federation.kill("blue")
    time.sleep(1)
    federation.coordinator("--keep-models", "50")
    federation.start_site("blue")
    federation("run", "watch", run)
    shown = federation.show(run)
    assert shown["run"]["state"] == "finished"
    for entry in shown["rounds"][1:]:
        assert sorted(s["site"] for s in entry["sites"] if s["work"] == "train" and s["state"] == "done") == [
            "blue",
            "green",
            "red",
        ]


def test_wrong_specs_are_told_before_anything_starts(federation, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(spec_of("wrong") | {"round": 3, "rounds": 0}))
    error = federation("run", "submit", str(path), status=2)
    assert "round: no such key" in error
    assert "rounds:" in error
    spec = spec_of("unknown-model", model={"config": {"model_type": "gpt17"}})
    path.write_text(yaml.safe_dump(spec))
    assert "gpt17" in federation("run", "submit", str(path), status=2)


def test_sigterm_ends_every_process_cleanly(federation):
    pids = [process.pid for process in federation.running.values()]
    statuses = federation.stop()
    assert set(statuses.values()) == {0}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, signal.SIG_DFL)
