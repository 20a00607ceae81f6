"""Null training with fedloom: the real coordinator and site daemons, as processes with certificates."""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gate import HAS_MODEL, HAS_UPDATE, Arrival, Gate
from measure import Sampler, Spread
from nullsite import CONSTANT
from nulltraining import Case, Figures, figures, gpt2_config
from numpy.typing import NDArray
from processes import ENVIRONMENT, Processes, free_port, wait_for_port

from fedloom.v1.runs_pb2 import (
    RUN_STATE_FINISHED,
    RUN_STATE_QUEUED,
    RUN_STATE_RUNNING,
    GetRequest,
    GetResponse,
)
from fedloom_common.errors import Unreachable
from fedloom_common.tensors import Manifest, read_into
from fedloom_server.console.connection import Operator
from fedloom_server.console.kit import create_kit

HERE = Path(__file__).resolve().parent
FEDLOOM = Path(sys.executable).with_name("fedloom")
WINDOW_BYTES = str(4 << 20)  # as for the floor: no line breaks here
POLL_S = 1.0  # a call costs the coordinator as much as a dozen chunks
ROUND_LIMIT_S = 900.0
PROBES = 16  # values looked at in each tensor


def run_null_training(
    case: Case, folder: Path, *, own_loopback: bool, round_limit_s: float = ROUND_LIMIT_S
) -> Figures:
    """Measure one case in a new folder.

    Raises:
        SystemExit: the run does not finish, or its model is not what it must be.
    """
    port, sites = free_port(), [f"site-{number}" for number in range(1, case.sites + 1)]
    folder.mkdir(parents=True)
    (_provision if case.tls else _write_configs)(folder / "kit", port, sites)
    for site in sites:  # nobody reads it, but a site without data is given no work
        data = folder / "kit/sites" / site / "data/texts.txt"
        data.parent.mkdir(exist_ok=True)
        data.write_text("A text.")
    initial: list[NDArray[np.float32]] = []

    def look(arrival: Arrival) -> None:
        if not initial:
            initial.append(_probe(Path(arrival.model)))

    def in_step(number: int) -> bool:
        return number > case.rounds

    with (
        tempfile.TemporaryDirectory(prefix="gate-") as short,  # a socket's path has at most 107 characters
        Gate(Path(short) / "gate", sites=case.sites, in_step=in_step, on_arrival=look) as gate,
        Processes(folder / "logs") as processes,
    ):
        started_at_s = time.time()
        _start(folder / "kit", processes, sites, port, gate.path)
        with Sampler(processes.pids()) as sampler:
            wait_for_port(port, processes)
            run_id = _submit(folder, case)
            answer = asyncio.run(_until_ended(folder / "kit", run_id, processes, round_limit_s))
    _require_sum(folder / "kit", answer, initial[0], case)
    ends_s = [record.ended_at_s for record in answer.rounds]
    return figures(
        "fedloom",
        case,
        sampler,
        model_bytes=answer.run.model.size_bytes,
        started_at_s=started_at_s,
        rounds_began_at_s=answer.run.started_at_s,
        round_ends_s=ends_s[: case.rounds],
        own_loopback=own_loopback,
        extra=_phases(answer, gate, case),
    )


def _provision(kit: Path, port: int, sites: Sequence[str]) -> None:
    """Certificates and configs, as `fedloom provision` makes them."""
    made = create_kit(kit, federation="benchmark", hosts=["localhost"], port=port)
    for site in sites:
        made.add_site(site)
    made.add_operator("bench")


def _write_configs(kit: Path, port: int, sites: Sequence[str]) -> None:
    """Configs without TLS, with names in clear."""
    address = f"localhost:{port}"
    _write(kit / "coordinator/coordinator.yaml", {"insecure": True, "state_dir": "state"})
    _write(kit / "operators/bench/operator.yaml", {"coordinator": address, "insecure": "bench"})
    data = {"texts": {"files": ["data/*.txt"]}}
    for site in sites:
        config = {"coordinator": address, "insecure": site, "state_dir": "state", "data": data}
        _write(kit / f"sites/{site}/site.yaml", config)


def _write(path: Path, config: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(config))


def _start(kit: Path, processes: Processes, sites: Sequence[str], port: int, gate: Path) -> None:
    processes.start(
        "server",
        [FEDLOOM, "coordinator", "--config", kit / "coordinator/coordinator.yaml",
         "--listen", f"127.0.0.1:{port}", "--keep-models", "1", "--window-bytes", WINDOW_BYTES],
    )  # fmt: skip
    for site in sites:
        processes.start(
            site,
            [sys.executable, HERE / "nullsite.py", site, gate, kit / f"sites/{site}/site.yaml",
             "--cache-models", "1", "--window-bytes", WINDOW_BYTES],
        )  # fmt: skip


def _submit(folder: Path, case: Case) -> str:
    """Submit the run as an operator does; gives its id."""
    spec = {
        "name": "null-training",
        "model": {"config": gpt2_config(case.model_bytes), "tokenizer": "bytes"},
        "data": "texts",
        "rounds": case.rounds + case.rounds_in_step,
        "cohort": {"min_sites": case.sites},
        "local": {"steps": 1, "batch_examples": 1},
        "evaluation": {"every_rounds": 0, "initial": False},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(spec))
    config = folder / "kit/operators/bench/operator.yaml"
    done = subprocess.run(
        [FEDLOOM, "run", "submit", "--quiet", path, "--config", config],
        check=False, capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"`fedloom run submit` failed:\n{done.stderr}")
    return done.stdout.strip()


async def _until_ended(kit: Path, run_id: str, processes: Processes, round_limit_s: float) -> GetResponse:
    """Everything about the run, as soon as it has finished."""
    rounds_done, moved_at_s, trouble = 0, time.monotonic(), ""
    async with Operator(config=kit / "operators/bench/operator.yaml").connect() as coordinator:
        while time.monotonic() - moved_at_s < round_limit_s:
            processes.require_alive()
            try:
                answer: GetResponse = await coordinator.call(coordinator.runs.Get, GetRequest(run_id=run_id))
            except Unreachable as error:  # a machine at its limit; the coordinator lives
                trouble = f": {error}"
            else:
                if answer.run.state == RUN_STATE_FINISHED:
                    return answer
                if answer.run.state not in (RUN_STATE_QUEUED, RUN_STATE_RUNNING):
                    raise SystemExit(f"the run did not finish: {answer.run.reason}")
                if answer.run.rounds_done > rounds_done:
                    rounds_done, moved_at_s = answer.run.rounds_done, time.monotonic()
            await asyncio.sleep(POLL_S)
    raise SystemExit(f"round {rounds_done + 1} is not done after {round_limit_s:g} s{trouble}")


def _phases(answer: GetResponse, gate: Gate, case: Case) -> dict[str, Any]:
    """What fedloom itself and the gate tell: payload bytes, and the way down and up of rounds in step."""
    counted = [record for record in answer.rounds if 1 < record.number <= case.rounds] or answer.rounds[:1]
    in_step = [record for record in answer.rounds if record.number > case.rounds]
    payload = sum(site.bytes_down + site.bytes_up for record in counted for site in record.sites)
    facts: dict[str, Any] = {
        "payload_bytes": payload // len(counted),
        "null_cpu_s": sum(gate.null_cpu_s(record.number) for record in counted) / len(counted),
    }
    if in_step:
        down = [gate.last_arrival_s(r.number, HAS_MODEL) - r.started_at_s for r in in_step]
        up = [r.ended_at_s - gate.last_arrival_s(r.number, HAS_UPDATE) for r in in_step]
        facts |= {"broadcast_s": Spread.of(down), "upload_fold_s": Spread.of(up)}
    return facts


def _probe(path: Path) -> NDArray[np.float32]:
    """Some values of every tensor."""
    values = []
    with path.open("rb", buffering=0) as file:
        for info in Manifest.read(path).tensors:
            for index in np.linspace(0, info.size_bytes // 4 - 1, PROBES, dtype=int):
                value = np.empty(1, np.float32)
                read_into(file.fileno(), value.data.cast("B"), info.start_bytes + 4 * int(index))
                values.append(value)
    return np.concatenate(values)


def _require_sum(kit: Path, answer: GetResponse, initial: NDArray[np.float32], case: Case) -> None:
    """Check that every round added the constant, to the bit: a fast wrong answer is no figure."""
    digest = answer.run.model.digest.replace(":", "-")
    found, wanted = _probe(kit / "coordinator/state/files" / digest), initial.copy()
    for _ in range(case.rounds + case.rounds_in_step):
        wanted += CONSTANT
    if not np.array_equal(found, wanted):
        worst = float(np.abs(found - wanted).max())
        raise SystemExit(
            f"the last model is not the first plus a constant a round: it is off by up to {worst:g}"
        )
