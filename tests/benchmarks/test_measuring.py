import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from gate import HAS_MODEL, Gate, Visitor
from measure import Sampler, Spread
from nullsite import CONSTANT, add_constant
from nulltraining import gpt2_config, size_bytes
from processes import Processes
from safetensors.numpy import load_file, save_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BURN = """
import subprocess, sys, time
held = bytearray(120_000_000)
held[::4096] = bytes(len(held[::4096]))
child = subprocess.Popen([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.6: pass"])
while time.process_time() < 0.5: pass
child.wait()
print("burnt", flush=True)
time.sleep(60)
"""


def test_cpu_time_of_a_process_and_its_ended_children_is_counted_and_its_peak_memory_seen(tmp_path):
    with Processes(tmp_path) as processes:
        burning = processes.start("burn", [sys.executable, "-c", BURN], talks=True)
        with Sampler(processes.pids()) as sampler:
            began_s = time.time()
            assert burning.stdout.readline() == b"burnt\n"
            ended_s = time.time()
            time.sleep(0.5)
        idle_s = time.time()
    assert sampler.cpu_s("burn", began_s - 1, ended_s + 0.2) == pytest.approx(1.1, abs=0.15)
    assert sampler.cpu_s("burn", ended_s + 0.2, idle_s) < 0.05
    assert 120e6 < sampler.peak_bytes("burn", began_s, ended_s) < 200e6


def test_the_work_of_others_is_counted_without_that_of_the_measured(tmp_path):
    busy = [sys.executable, "-c", "while True: pass"]
    with Processes(tmp_path) as processes, Processes(tmp_path) as strangers:
        ours = psutil.Process(processes.start("ours", busy).pid)
        other = psutil.Process(strangers.start("stranger", busy).pid)
        with Sampler(processes.pids()) as sampler:
            time.sleep(0.2)
            began_s, began = time.time(), [sum(process.cpu_times()) for process in (ours, other)]
            time.sleep(1.0)
            ended, ended_s = [sum(process.cpu_times()) for process in (ours, other)], time.time()
            time.sleep(0.2)
    our_s, other_s = (end - begin for begin, end in zip(began, ended, strict=True))
    others_s = sampler.others_cores(began_s, ended_s) * (ended_s - began_s)
    all_s = os.cpu_count() * (ended_s - began_s)
    assert other_s - 0.15 < others_s < all_s - our_s + 0.15


def test_a_killed_program_takes_its_processes_with_it(tmp_path):
    program = f"""
import sys, time
sys.path.append({str(BENCHMARKS)!r})
from pathlib import Path
from processes import Processes
processes = Processes(Path({str(tmp_path)!r}))
print(processes.start("sleeper", ["sleep", "100"]).pid, flush=True)
time.sleep(100)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    sleeper = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    psutil.wait_procs([sleeper], timeout=60)
    assert not sleeper.is_running()


def test_a_process_that_ends_early_is_told_with_the_end_of_its_log(tmp_path):
    with Processes(tmp_path) as processes:
        processes.start("failing", [sys.executable, "-c", "raise SystemExit('no such thing')"]).wait()
        with pytest.raises(SystemExit, match=r"failing ended with status 1(.|\n)*no such thing"):
            processes.require_alive()


@pytest.mark.parametrize("text", ["10MB", "200MB", "1GB", "7GB"])
def test_models_have_the_size_that_was_asked_for_within_a_hundredth(text):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = gpt2_config(size_bytes(text))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 4 * parameters == pytest.approx(size_bytes(text), rel=0.01)
    assert len(list(model.parameters())) > 20


def test_null_training_adds_the_constant_to_every_value_and_keeps_what_is_not_fp32(tmp_path):
    tensors = {
        "large": np.arange(700_001, dtype=np.float32).reshape(1, -1),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "mask": np.array([True, False]),
    }
    save_file(tensors, tmp_path / "model", metadata={"format": "pt"})
    add_constant(tmp_path / "model", tmp_path / "update")
    update = load_file(tmp_path / "update")
    assert update.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor if name == "mask" else tensor + CONSTANT
        np.testing.assert_array_equal(update[name], wanted)


async def test_sites_in_step_go_on_only_when_all_have_come(tmp_path):
    import asyncio

    with Gate(tmp_path / "gate", sites=2, in_step=lambda number: number == 2) as gate:
        first, second = Visitor(gate.path, "a"), Visitor(gate.path, "b")
        await first.arrive(1, HAS_MODEL, model=tmp_path)  # not in step: alone
        waiting = asyncio.create_task(first.arrive(2, HAS_MODEL, model=tmp_path))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await second.arrive(2, HAS_MODEL, model=tmp_path, cpu_s=0.25)
        await waiting
        first.close()
        second.close()
    assert [(arrival.site, arrival.round) for arrival in gate.arrivals] == [("a", 1), ("a", 2), ("b", 2)]
    assert gate.last_arrival_s(2, HAS_MODEL) == gate.arrivals[2].at_s
    assert gate.null_cpu_s(2) == 0.25


def test_a_spread_is_the_median_between_the_smallest_and_the_largest():
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=5.0, count=3)


def test_sizes_are_decimal_and_other_words_are_refused():
    assert [size_bytes(text) for text in ("10MB", "1.5gb")] == [10_000_000, 1_500_000_000]
    for wrong in ("10", "1GiB", "many MB"):
        with pytest.raises(ValueError, match=r"not a size|could not convert"):
            size_bytes(wrong)


@pytest.mark.slow
def test_the_transport_benchmark_measures_every_kind_checks_the_sums_and_leaves_nothing(tmp_path):
    output, plot, scratch = tmp_path / "figures.json", tmp_path / "plot.png", tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "transport.py", "--sizes", "1MB", "--sites", "2", "--rounds", "13",
         "--rounds-in-step", "1", "--scratch", scratch, "--json", output, "--plot", plot],
        check=False, capture_output=True, text=True, timeout=280,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(output.read_text())["cases"]
    assert [figures["tls"] for figures in case["fedloom"]] == [True, False]
    for figures in case["fedloom"]:
        assert figures["round_s"]["count"] == 12
        assert figures["extra"]["payload_bytes"] == 4 * figures["model_bytes"]
        if figures["wire_bytes"] is not None:
            assert figures["wire_bytes"] == pytest.approx(figures["extra"]["payload_bytes"], rel=0.25)
        assert set(figures["of_bare"]) == {"round", "broadcast", "upload_fold"}
    kinds = {(bare["kind"], bare["tls"]) for bare in case["bare"]}
    assert {("grpc upload", True), ("grpc broadcast", False), ("tcp sink", False)} < kinds
    assert plot.stat().st_size > 1000
    assert list(scratch.iterdir()) == []
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(scratch) in str(p.info["cmdline"])]
