"""Does what is missing of a profile's trials, then prints tables and gates and draws the curves.

    python -m learning                            the short profile, on the demo's texts
    python -m learning --profile full             goes on where it was stopped
    python -m learning --corpus ~/novels --split file

A corpus is a folder of .txt files. Results are kept, one file a trial; a trial is done again only if its run
spec or its data has changed. The exit status is 1 if a gate fails.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

sys.path.append(str(Path(__file__).parents[1]))  # the modules beside this folder

from machine import machine_facts

from learning.corpora import EXAMPLE, SPLITS, split_corpus
from learning.ddp import difference_from_ddp
from learning.federation import federation
from learning.gates import Gate, gates_of
from learning.plots import save_curves
from learning.profiles import PROFILES
from learning.results import Results, line_of
from learning.tables import comparison, gates_table
from learning.trials import Experiment, digest_of_data, run_experiment
from learning.workbench import Workbench

PACKAGES = ("fedloom", "torch", "transformers", "numpy")
MEMORY = Path("/dev/shm")  # a file system in memory, where there is one


def main(
    profile: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "short",
    corpus: Annotated[Path, typer.Option(help="Folder of .txt files.")] = EXAMPLE,
    split: Annotated[str, typer.Option(help=f"How sites share it: {', '.join(SPLITS)}.")] = "role",
    results: Annotated[Path, typer.Option(help="Folder for results, tables and plots.")] = Path(
        "learning-results"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Names of experiments; all if not given.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of a training; all cores if 0.", min=0)] = 0,
    scratch: Annotated[Path | None, typer.Option(help="Folder for what is not kept.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Try nothing; tell of what is there.")] = False,
) -> None:
    """Federated beside pooled training."""
    if profile not in PROFILES or split not in SPLITS:
        raise SystemExit(
            f"--profile is one of {', '.join(PROFILES)}, and --split of {', '.join(SPLITS)}; "
            f"came {profile} and {split}"
        )
    logging.basicConfig(level=logging.ERROR)
    folder = results / profile
    folder.mkdir(parents=True, exist_ok=True)
    experiments = [e for e in PROFILES[profile]().language if only is None or e.name in only]
    if not report:
        with _scratch(scratch) as place:
            bench = Workbench(device=_device(), warm=32, threads=threads or len(os.sched_getaffinity(0)))
            for experiment in experiments:
                asyncio.run(_try(experiment, corpus, split, folder, place / experiment.name, bench))
            bench.close()
        (folder / "machine.json").write_text(json.dumps(machine_facts(PACKAGES), indent=2) + "\n")
    raise SystemExit(0 if _report(experiments, folder) else 1)


async def _try(
    experiment: Experiment, corpus: Path, split: str, folder: Path, place: Path, bench: Workbench
) -> None:
    """Do an experiment's missing trials."""
    print(f"\n{experiment.title}", flush=True)
    sites = split_corpus(corpus, split, experiment.setting.sites, place / "texts")
    digest = digest_of_data(sites)
    async with federation(sites, bench, place / "federation") as running:
        exact = folder / f"{experiment.name}.exact.json"
        if experiment.name == "gates" and not exact.exists():
            difference, step = await difference_from_ddp(running, experiment.setting, place / "ddp")
            exact.write_text(json.dumps({"difference": difference, "step": step}) + "\n")
        await run_experiment(experiment, running, digest, Results(folder))


def _report(experiments: Sequence[Experiment], folder: Path) -> bool:
    """Print and save tables, gates and curves; says whether all gates hold."""
    results, gates = list(Results(folder)), list[Gate]()
    (folder / "results.jsonl").write_text("".join(map(line_of, results)))
    for experiment in experiments:
        mine = [result for result in results if result.experiment == experiment.name]
        print(f"\n{experiment.title}\n\n{comparison(experiment, mine)}")
        save_curves(experiment, mine, folder / f"{experiment.name}.png")
        if experiment.name == "gates":
            gates += gates_of(mine, _exact(folder), {"diloco-h10": 10, "diloco-h50": 50})
    if gates:
        print(gates_table(gates))
        (folder / "gates.json").write_text(json.dumps([asdict(gate) for gate in gates], indent=2) + "\n")
    print(f"Results, tables and plots: {folder}")
    return all(gate.holds for gate in gates)


def _exact(folder: Path) -> tuple[float, float] | None:
    path = folder / "gates.exact.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return content["difference"], content["step"]


@contextlib.contextmanager
def _scratch(wanted: Path | None) -> Iterator[Path]:
    """A folder that goes at the end."""
    room = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4e9 else None
    with tempfile.TemporaryDirectory(prefix="fedloom-learning-", dir=wanted or room) as name:
        yield Path(name)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    typer.run(main)
