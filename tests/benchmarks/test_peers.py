import io
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import typer
from environments import Environment, make_environment
from guard import MemoryGuard
from measure import GB, MB, Spread
from nulltraining import Case, Figures, gpt2_config, gpt2_shapes, matrix
from peer import OPERATOR, Told, Watch, require_sum
from peer_tables import WIDTH, Outcome, as_data, notes, ratios, save_plot, table
from peers import measure
from processes import Processes
from rich.console import Console

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS / "peer_apps"))

from nullmodel import CASE, NullCase  # noqa: E402  # it lies where the peers' processes look for it

CASE_10MB = Case(model_bytes=10 * MB, sites=2, rounds=3)
OURS = Figures(
    system="fedloom",
    model_bytes=10 * MB,
    sites=2,
    tls=True,
    round_s=Spread(0.5, 0.4, 0.6, 2),
    first_round_s=4.0,
    server_peak_bytes=100 * MB,
    client_peak_bytes=50 * MB,
    server_cpu_s=0.25,
    client_cpu_s=0.15,
    wire_bytes=None,
    others_cores=0.75,
    extra={},
)
THEIRS = replace(
    OURS,
    system="Flower",
    round_s=Spread(5.0, 5.0, 5.0, 2),
    first_round_s=6.0,
    server_peak_bytes=300 * MB,
    client_peak_bytes=25 * MB,
    server_cpu_s=1.0,
    client_cpu_s=3.0,
)
OUTCOMES = [
    Outcome(system="fedloom", case=CASE_10MB, figures=OURS),
    Outcome(system="Flower", case=CASE_10MB, figures=THEIRS),
    Outcome(system="NVIDIA FLARE", case=CASE_10MB, failure="the server ended\nwith status 1"),
]
MACHINE = {
    "at": "now", "cores": 2, "processor": "a", "memory_bytes": GB, "kernel": "6", "python": "3", "load": 1.0,
    "versions": {"flwr": "1"}, "scratch_bytes_per_s": MB, "load_after": 1.0,
}  # fmt: skip


def test_ratios_are_the_peers_figures_by_fedlooms():
    assert ratios(THEIRS, OURS) == pytest.approx(
        {"round": 10.0, "first_round": 1.5, "server_memory": 3.0, "client_memory": 0.5, "cpu": 10.0}
    )


def test_the_table_shows_figures_ratios_and_failures_with_their_reasons():
    shown = Console(width=WIDTH, record=True, file=io.StringIO())
    shown.print(table(OUTCOMES, MACHINE))
    lines = shown.export_text().splitlines()
    (flower,) = [line for line in lines if "Flower" in line]
    assert " ".join(flower.split()[1:]) == (
        "5.00 (5.00-5.00) 6.0 300 (30.0) 25 1.00 / 3.00 10.0 / 1.5 3.0 / 0.5 10.0 0.8"
    )
    (failed,) = [line for line in lines if "NVIDIA" in line]
    assert failed.split() == ["NVIDIA", "FLARE", "failed:", "note", "1"]
    assert list(notes(OUTCOMES)) == ["note 1: NVIDIA FLARE, 10 MB x 2: the server ended with status 1"]


def test_a_case_in_which_fedloom_failed_has_no_ratios():
    (case,) = as_data([replace(OUTCOMES[0], figures=None, failure="no"), OUTCOMES[1]])
    assert [system["times_fedloom"] for system in case["systems"]] == [None, None]
    assert case["systems"][1]["figures"]["first_round_s"] == 6.0


def test_json_keeps_failures_and_all_cases():
    other = [replace(outcome, case=replace(CASE_10MB, sites=4)) for outcome in OUTCOMES]
    cases = json.loads(json.dumps(as_data([*OUTCOMES, *other])))
    assert [case["sites"] for case in cases] == [2, 4]
    assert cases[0]["systems"][2]["failure"] == "the server ended\nwith status 1"
    assert cases[1]["systems"][1]["times_fedloom"]["round"] == pytest.approx(10.0)


def test_a_plot_is_drawn_with_failures_in_it(tmp_path):
    save_plot(OUTCOMES, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("model_bytes", [10 * MB, 200 * MB])
def test_peers_get_the_tensors_that_fedlooms_model_has(model_bytes):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**gpt2_config(model_bytes)))
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert gpt2_shapes(model_bytes) == wanted


def test_options_name_every_size_with_every_number_of_sites():
    assert matrix("10MB,1GB", "2,8") == [(10 * MB, 2), (10 * MB, 8), (GB, 2), (GB, 8)]
    with pytest.raises(typer.BadParameter, match=r"'many' is not a size.*wanted lists such as"):
        matrix("many", "2")


@pytest.mark.parametrize(
    "error", [SystemExit("no \x1b[92msuch thing\x1b[0m"), ConnectionError("no such thing")]
)
def test_a_failing_system_is_an_outcome_and_leaves_nothing(error, tmp_path):
    def fail(case, folder):
        (folder / "model").write_bytes(b"0")
        raise error

    outcome = measure("Flower", fail, CASE_10MB, tmp_path, memory_bytes=None)
    assert (outcome.figures, outcome.failure) == (None, "no such thing")
    assert list(tmp_path.iterdir()) == []


def test_a_case_that_takes_more_memory_than_allowed_is_stopped_with_all_its_processes(tmp_path):
    hoard = (
        "held = bytearray(200_000_000)\nheld[::4096] = bytes(len(held[::4096]))\nimport time\ntime.sleep(60)"
    )
    # The hoarder is in a session of its own and has lost its parent, as daemons do.
    escape = f"setsid {sys.executable} -c '{hoard}' & echo $! > {tmp_path}/pid"
    started = []

    def run(case, folder):
        with Processes(folder) as processes:
            processes.start("escaping", ["bash", "-c", escape])
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                time.sleep(0.01)
            started.append(psutil.Process(int((tmp_path / "pid").read_text())))
            started[0].wait(timeout=60)
            raise SystemExit("the hoarder is gone")

    outcome = measure("Flower", run, CASE_10MB, tmp_path, memory_bytes=150 * MB)
    assert outcome.failure == ("stopped: its processes took 0.2 GB of memory, the limit is 0.1 GB (--memory)")
    assert not started[0].is_running()


def test_what_a_case_leaves_running_is_ended_with_it():
    with MemoryGuard() as guard:
        left = subprocess.Popen(["setsid", "sleep", "60"])
    assert guard.reason is None
    assert not psutil.pid_exists(left.pid)
    left.wait()


def test_told_lines_are_read_when_they_are_whole(tmp_path):
    marks = tmp_path / "marks"
    assert Told.read(marks) == Told([], None)
    marks.write_text('{"round": 0, "at_s": 1.5}\n{"round": 1, "at_s": 2.5}\n{"off_by": 0.0, "wr')
    assert Told.read(marks) == Told([1.5, 2.5], None)


@pytest.mark.parametrize(
    ("verdict", "is_right"),
    [
        pytest.param({"off_by": 1e-8, "wrong": []}, True, id="rounding"),
        pytest.param({"off_by": 1e-3, "wrong": []}, False, id="a-round-too-few"),
        pytest.param({"off_by": math.nan, "wrong": []}, False, id="nan"),
        pytest.param({"off_by": 0.0, "wrong": ["w"]}, False, id="a-tensor-missing"),
        pytest.param({}, False, id="nothing-told"),
    ],
)
def test_only_the_first_model_plus_the_constants_is_right(verdict, is_right):
    told = Told([1.0, 2.0], verdict)
    if is_right:
        require_sum(told)
    else:
        with pytest.raises(SystemExit, match="not the first plus a constant a round"):
            require_sum(told)


def test_a_peers_server_tells_when_rounds_end_and_how_far_off_its_model_is(tmp_path, monkeypatch):
    marks = tmp_path / "marks"
    facts = {"sites": 2, "rounds": 2, "shapes": {"a": [3, 2], "b": [4]}, "marks": str(marks)}
    (tmp_path / "case.json").write_text(json.dumps(facts))
    monkeypatch.setenv(CASE, str(tmp_path / "case.json"))
    case = NullCase()
    first = dict(case.initial())
    assert [tensor.shape for tensor in first.values()] == [(3, 2), (4,)]
    np.testing.assert_array_equal(first["a"], dict(case.initial())["a"])
    case.mark(0)
    case.check(
        [("a", first["a"] + np.float32(0.002)), ("b", first["b"].astype(np.float64)), ("c", first["b"])]
    )
    told = Told.read(marks)
    assert told.marks_s == [pytest.approx(time.time(), abs=60)]
    assert told.verdict == {"off_by": pytest.approx(0.0, abs=1e-8), "wrong": ["c", "b"]}
    marks.unlink()
    case.check([("a", first["a"] + np.float32(0.001)), ("b", np.full(4, np.nan, np.float32))])
    assert math.isnan(Told.read(marks).verdict["off_by"])


def test_a_run_is_given_up_when_a_round_takes_too_long_or_a_process_has_ended(tmp_path):
    marks = tmp_path / "marks"
    marks.write_text('{"round": 0, "at_s": 1.5}\n')
    with Processes(tmp_path) as processes, Processes(tmp_path) as operators:
        server = processes.start("server", [sys.executable, "-c", "print('busy'); input()"], talks=True)
        operators.start(OPERATOR, ["sleep", "60"])
        watch = Watch(marks, 2, processes, operators)
        with pytest.raises(SystemExit, match=r"round 1 of 2 is not done after 0\.5 s\n"):
            watch.until_told(0.5)
        server.stdin.close()
        server.wait()
        with pytest.raises(SystemExit, match=r"server ended with status 1(.|\n)*EOFError"):
            watch.until_told(60)


def test_an_environment_is_made_once_and_anew_for_other_packages(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr("environments._run", lambda command, wanted: commands.append(command))

    def make(*requirements):
        commands.clear()
        (tmp_path / "env").mkdir(exist_ok=True)
        assert make_environment(tmp_path / "env", requirements) == Environment(tmp_path / "env")
        return [str(command[-1]) for command in commands]

    assert make("peer==1") == [str(tmp_path / "env"), "peer==1"]
    assert make("peer==1") == []
    assert make("peer==2") == [str(tmp_path / "env"), "peer==2"]


@pytest.mark.slow
def test_the_benchmark_measures_fedloom_and_tells_of_a_peer_that_cannot_be_installed(tmp_path):
    output, plot, scratch = tmp_path / "figures.json", tmp_path / "plot.png", tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "peers.py", "--sizes", "1MB", "--sites", "2", "--rounds", "3",
         "--systems", "fedloom,flower", "--environments", tmp_path / "environments",
         "--scratch", scratch, "--json", output, "--plot", plot],
        check=False, capture_output=True, text=True, timeout=280,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(output.read_text())["cases"]
    ours, flower = case["systems"]
    assert ours["figures"]["round_s"]["count"] == 2
    assert flower["figures"] is None
    assert "could not install flwr==" in flower["failure"]
    assert "note 1: Flower, 1 MB x 2: could not install" in done.stdout
    assert plot.stat().st_size > 1000
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "environments/flwr/fedloom-benchmark.txt").exists()
