"""Aggregation rules and server steps side by side: CPU time and memory, on random updates.

    python benchmarks/aggregation.py
    python benchmarks/aggregation.py --sites 32 --model-mb 64

Each runs in a process of its own, in its turn, on files that are warm. CPU seconds are of all threads
together, so that other load on the machine hardly matters; the least of the repeats is told.
"""

import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from machine import machine_facts
from rich.console import Console
from rich.table import Table

from fedloom_common.floats import encode
from fedloom_common.runspec import Aggregation
from fedloom_common.tensors import encode_header
from fedloom_server.aggregation import Update, aggregator_for
from fedloom_server.optimizers import optimizer_for
from fedloom_server.serverstep import Step, take_step

RULES: dict[str, Any] = {
    "weighted_mean": "weighted_mean",
    "median": "median",
    "trimmed_mean": {"name": "trimmed_mean", "byzantine": 1},
    "krum": {"name": "krum", "byzantine": 1},
    "multi_krum": {"name": "multi_krum", "byzantine": 1},
    "geometric_median": "geometric_median",
}
STEPS = ("fedavgm", "diloco", "fedadam", "fedyogi", "fedadagrad")
MB = 1_000_000
PART_VALUES = 1 << 20

console = Console(stderr=True)


def write_model(path: Path, model_mb: int, seed: int) -> None:
    """A file with one fp32 tensor of normal values."""
    rng, left = np.random.default_rng(seed), model_mb * MB // 4
    with path.open("wb") as file:
        file.write(encode_header([("w", "F32", (left,))]))
        while left > 0:
            count = min(left, PART_VALUES)
            raw = np.empty(4 * count, np.uint8)
            encode(rng.normal(size=count), "F32", raw)
            file.write(raw.data)
            left -= count


def measure(folder: Path, name: str, sites: int, repeats: int) -> dict[str, Any]:
    """CPU seconds, and memory beyond what the process had before; of a rule, or of a server step."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before_kib, seconds = memory_kib("VmRSS"), []
    for _ in range(repeats):
        began_s = time.process_time()
        if name in RULES:
            aggregate(folder, name, sites)
        else:
            step(folder, name)
        seconds.append(time.process_time() - began_s)
    grown_kib = memory_kib("VmHWM") - before_kib
    return {"name": name, "cpu_s": min(seconds), "memory_mb": grown_kib * 1024 / MB}


def memory_kib(name: str) -> int:
    """Resident memory of this process: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def aggregate(folder: Path, name: str, sites: int) -> None:
    """One round's rule."""
    updates = [Update(site=str(k), path=folder / f"update-{k}", examples=1 + k) for k in range(sites)]
    rule = aggregator_for(Aggregation(rule=RULES[name]))
    rule.aggregate(folder / "base", updates, folder / "out")


def step(folder: Path, name: str) -> None:
    """One round's server step, with a state from the step before."""
    spec = Aggregation.model_validate({"server_optimizer": name}).server_optimizer
    optimizer, state = optimizer_for(spec), folder / f"state-{name}"
    assert optimizer is not None
    take_step(
        Step(
            optimizer=optimizer, rate=0.1, base=folder / "base", centre=folder / "update-0",
            state=state if state.exists() else None,
        ),
        folder / "out", folder / f"state-{name}",
    )  # fmt: skip


def main(
    sites: Annotated[int, typer.Option(min=5)] = 8,
    model_mb: Annotated[int, typer.Option(min=1)] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    scratch: Annotated[Path | None, typer.Option(help="Folder for the files.")] = None,
) -> None:
    """Measure every rule and every step; a table on standard error, JSON on standard output."""
    rows = []
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        for number, file in enumerate(["base", *(f"update-{k}" for k in range(sites))]):
            write_model(folder / file, model_mb, number)
        for what in (*RULES, *STEPS):
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context) as pool:
                rows.append(pool.submit(measure, folder, what, sites, repeats).result())
    table = Table("rule or step", "CPU s", "memory MB", title=f"{sites} updates of {model_mb} MB")
    for row in rows:
        table.add_row(row["name"], f"{row['cpu_s']:.2f}", f"{row['memory_mb']:.0f}")
    console.print(table)
    facts = machine_facts(("fedloom", "numpy"))
    typer.echo(json.dumps({"machine": facts, "sites": sites, "model_mb": model_mb, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
