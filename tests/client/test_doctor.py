"""What ``fedloom doctor site`` finds on a host; tests/server has the way to a coordinator."""

import json
import os
import subprocess

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from fedloom_client import doctor
from fedloom_client.doctor import examination
from fedloom_client.hardware import Device

TEXT = "It was the best of times, it was the worst of times. " * 400


@pytest.fixture
def site(tmp_path):
    """A function that writes a config with changes and gives the findings of one part."""
    (tmp_path / "a.txt").write_text(TEXT)
    content = {
        "coordinator": "127.0.0.1:1",
        "insecure": "oslo",
        "state_dir": "state",
        "disk_floor_bytes": 0,
        "workers": {"device": "cpu"},
        "data": {"plays": {"files": ["*.txt"]}},
    }

    def findings(part, **changes):
        path = tmp_path / "site.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return [(str(item.verdict), item.told) for item in examination(path, []) if item.part == part]

    return findings


@pytest.mark.parametrize(("pid", "advice"), [("own", "attaches by itself"), ("gone", "start it with")])
def test_a_daemon_that_runs_is_not_to_be_started(site, tmp_path, pid, advice):
    gone = subprocess.Popen(["true"])
    gone.wait()
    status = {"attached": False, "reason": "blocked", "pid": os.getpid() if pid == "own" else gone.pid}
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "status.json").write_text(json.dumps(status))
    site("daemon")
    (finding,) = (item for item in examination(tmp_path / "site.yaml", []) if item.part == "daemon")
    assert advice in finding.advice


def test_data_that_can_be_read_is_well_and_none_of_it_is_shown(site):
    found = site("data set plays")

    assert {verdict for verdict, _ in found} == {"ok"}
    assert "best of times" not in str(found)


def test_a_site_that_only_measures_may_hold_out_all_it_has(site):
    everything = {"plays": {"files": ["*.txt"], "held_out": 1.0}}
    assert {verdict for verdict, _ in site("data set plays", data=everything, trains=False)} == {"ok"}
    assert "problem" in {verdict for verdict, _ in site("data set plays", data=everything)}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        pytest.param({"files": ["*.csv"]}, "no file matches", id="nothing-matches"),
        pytest.param({"files": ["more"]}, "/more is a folder: give /", id="a-folder"),
        pytest.param({"files": ["more/"], "format": "jsonl"}, "/more/*.jsonl", id="a-folder-of-records"),
        pytest.param({"files": ["bad.txt"], "format": "dataset"}, "bad.txt is no folder", id="no-folder"),
        pytest.param({"files": ["bad.txt"]}, "is not UTF-8 text", id="not-text"),
        pytest.param({"files": ["empty.txt"]}, "no text", id="empty"),
        pytest.param(
            {"files": ["one.jsonl"], "format": "jsonl", "held_out": 0.01}, "held_out of 0.01 takes 0",
            id="nothing-held-out",
        ),
    ],
)  # fmt: skip
def test_data_that_training_would_fail_on_is_a_problem(site, tmp_path, source, told):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00bad")
    (tmp_path / "bad.jsonl").write_text('{"body": "text"}\n')
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "more").mkdir()

    found = site("data set plays", data={"plays": source})

    assert [text for verdict, text in found if verdict == "problem" and told in text], found


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, [("warning", "its records have body, and none of text, source, messages, prompt")]),
        ({"text": "body"}, []),
        ({"text": "title"}, [("problem", "have no field title: they have body")]),
    ],
)
def test_records_without_a_field_that_tasks_read_are_told_of(site, tmp_path, fields, told):
    (tmp_path / "some.jsonl").write_text('{"body": "some text, which is long enough"}\n' * 400)

    found = site(
        "data set plays", data={"plays": {"files": ["some.jsonl"], "format": "jsonl", "fields": fields}}
    )

    bad = [(verdict, text) for verdict, text in found if verdict != "ok"]
    assert len(bad) == len(told)
    assert all(
        verdict == wanted and part in text for (verdict, text), (wanted, part) in zip(bad, told, strict=True)
    )


def test_where_the_policy_permits_plugins_records_may_have_any_fields(site, tmp_path):
    (tmp_path / "some.jsonl").write_text(json.dumps({"words": "x" * 40}) + "\n")
    data = {"plays": {"files": ["some.jsonl"], "format": "jsonl", "held_out": 0.5}}
    found = site("data set plays", data=data, policy={"task_plugins": ["wordtags"]})
    assert not [text for _, text in found if "none of text" in text]


def test_a_policy_file_is_read_as_the_daemon_would(site, tmp_path):
    assert [verdict for verdict, _ in site("policy")] == ["ok"]
    [(verdict, told)] = site("policy", policy_file="rules.yaml")
    assert (verdict, "rules.yaml cannot be read, so everything is refused" in told) == ("problem", True)
    (tmp_path / "rules.yaml").write_text("max_step: 5\n")
    [(verdict, told)] = site("policy", policy_file="rules.yaml")
    assert (verdict, "max_step: no such key; known are tasks, " in told) == ("problem", True)
    (tmp_path / "rules.yaml").write_text("task_plugins: [wordtags]\n")
    assert [verdict for verdict, _ in site("policy", policy_file="rules.yaml")] == ["ok"]
    (tmp_path / "some.jsonl").write_text(json.dumps({"words": "x" * 40}) + "\n")
    data = {"plays": {"files": ["some.jsonl"], "format": "jsonl", "held_out": 0.5}}
    found = site("data set plays", data=data, policy_file="rules.yaml")
    assert not [text for _, text in found if "none of text" in text]


@pytest.mark.parametrize("place", ["policy", "policy_file"])
def test_a_policy_that_names_a_data_set_that_is_not_there_is_warned_of(site, tmp_path, place):
    rules = {"data_sets": ["play", "plays"]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    found = site("policy", **{place: rules if place == "policy" else "rules.yaml"})
    assert found == [("warning", "policy.data_sets names play, data has plays")]


def test_a_policy_that_is_wrong_itself_is_only_told_of_with_the_config(site):
    assert site("policy", policy={"max_step": 5}) == []
    assert site("policy", policy={"data_sets": ["plays"]}, data={}) == [("ok", "its rules can be read")]


def test_directories_of_models_and_their_files_are_looked_at(site, tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    save_file({"w": np.zeros(3, np.float32)}, good / "model.safetensors")
    [(verdict, told)] = site("models smollm2", models={"smollm2": "good"})
    assert (verdict, "model.safetensors can be read" in told) == ("ok", True)
    (good / "cut.safetensors").write_bytes(b"no tensors")
    (good / "gone.safetensors").symlink_to("nowhere")
    found = site("models smollm2", models={"smollm2": "good"})
    assert [verdict for verdict, _ in found] == ["problem", "problem", "ok"]
    assert "the link leads nowhere" in found[1][1]


@pytest.mark.parametrize(
    ("place", "told"),
    [("none", "No such file"), ("empty", "no .safetensors file"), ("a.txt", "is no directory")],
)
def test_a_directory_without_models_is_a_problem(site, tmp_path, place, told):
    (tmp_path / "empty").mkdir()
    [(verdict, text)] = site("models smollm2", models={"smollm2": place})
    assert (verdict, told in text) == ("problem", True)


def test_several_mistakes_in_a_config_are_each_told_and_data_is_looked_at_all_the_same(site):
    config = site("config", cache_models=0, coordinator="nowhere")
    data = site("data set plays", cache_models=0, coordinator="nowhere")

    assert [verdict for verdict, _ in config] == ["problem", "problem"]
    assert {verdict for verdict, _ in data} == {"ok"}


def test_gpus_that_torch_cannot_use_are_a_problem_with_what_to_do(site, monkeypatch):
    gpus = (Device(kind="cuda", name="GPU", memory_bytes=1 << 35),) * 2
    monkeypatch.setattr(doctor, "find_devices", lambda wanted: gpus)
    monkeypatch.setattr(
        doctor.subprocess,
        "run",
        lambda *a, **k: subprocess.CompletedProcess([], 0, "12.8 0\n", "driver too old (version 11040)"),
    )

    found = site("devices", workers={"device": "auto", "nproc_per_node": 3})

    problems = [text for verdict, text in found if verdict == "problem"]
    assert problems == [
        "workers.nproc_per_node is 3, there are 2 GPUs",
        "torch (for CUDA 12.8) can use 0 of 2 GPUs: driver too old (version 11040)",
    ]


def test_cuda_without_a_device_is_a_problem(site, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)

    found = site("devices", workers={"device": "cuda"})

    assert "problem" in {verdict for verdict, _ in found}


def test_a_state_folder_that_cannot_be_written_is_a_problem(site, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)

    [(verdict, told)] = site("state")

    assert verdict == "problem"
    assert "cannot be written by user" in told


def test_three_times_the_largest_model_must_fit(site, tmp_path, monkeypatch):
    (tmp_path / "state/models").mkdir(parents=True)
    (tmp_path / "state/models/m.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 2900, "total": 9999}))

    found = site("state")

    assert ("problem", "2.9 kB are free, 3 models of 1 kB need 3 kB") in found
