"""Does what is missing of a profile's trials, then prints tables and gates and draws the curves.

    python -m learning                            the short profile, on the demo's texts
    python -m learning --profile full             goes on where it was stopped
    python -m learning --corpus ~/novels --split file

A corpus is a folder of .txt files. Results are kept, one file a trial; a trial is done again only if its run
spec or its data has changed, and not if fedloom has: for figures of changed code give a new folder. The exit
status is 1 if a gate fails or has no figure, or an experiment could not be done.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

sys.path.append(str(Path(__file__).parents[1]))  # the modules beside this folder

from machine import machine_facts

from learning.corpora import EXAMPLE, SPLITS, digest_of_corpus
from learning.gates import Gate, gates_of
from learning.plots import save_curves
from learning.profiles import PROFILES, Place, Plan, plans
from learning.results import Results, line_of, read_lines
from learning.tables import by_site, comparison, gates_table, replace_section
from learning.trials import Experiment
from learning.workers import MOST, do_trials, exact_file

PACKAGES = ("fedloom", "torch", "transformers", "numpy")
MEMORY = Path("/dev/shm")  # a file system in memory, where there is one


def main(
    profile: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "short",
    corpus: Annotated[Path, typer.Option(help="Folder of .txt files.")] = EXAMPLE,
    split: Annotated[str, typer.Option(help=f"How sites share it: {', '.join(SPLITS)}.")] = "role",
    results: Annotated[Path, typer.Option(help="Folder for results, plots and what is fetched.")] = Path(
        "learning-results"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Names of experiments; all if not given.")] = None,
    processes: Annotated[
        int, typer.Option(help=f"Processes that train; one a core, up to {MOST}, if 0.", min=0)
    ] = 0,
    scratch: Annotated[Path | None, typer.Option(help="Folder for what is not kept.")] = None,
    take_over: Annotated[
        Path | None, typer.Option(help="File of results that count as done here, such as a page's.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Try nothing; tell of what is there.")] = False,
    page: Annotated[
        Path | None, typer.Option(help="A page whose tables, between its marks, are made anew.")
    ] = None,
) -> None:
    """Federated beside pooled training."""
    if profile not in PROFILES or split not in SPLITS:
        raise SystemExit(
            f"--profile is one of {', '.join(PROFILES)}, and --split of {', '.join(SPLITS)}; "
            f"came {profile} and {split}"
        )
    # Another corpus or split is another folder: their figures must never meet in one table.
    folder = results / f"{profile}-{split}-{digest_of_corpus(corpus)}"
    folder.mkdir(parents=True, exist_ok=True)
    if take_over is not None:
        Results(folder).take_over(read_lines(take_over.read_text()))
    with _scratch(scratch) as below:
        place = Place(corpus=corpus, split=split, downloads=(results / "downloads").absolute(), scratch=below)
        wanted = _wanted(plans(profile, place), only, profile)
        undone = {} if report else _try(wanted, profile, place, folder, processes)
    if not report:
        facts = machine_facts(PACKAGES) | {"corpus": corpus.name, "split": split}
        (folder / "machine.json").write_text(json.dumps(facts, indent=2) + "\n")
    passes = _report(wanted, folder, page, profile)
    for name, reason in undone.items():
        print(f"{name} was not done: {reason}", file=sys.stderr)
    raise SystemExit(0 if passes and not undone else 1)


def _try(wanted: Sequence[Plan], profile: str, place: Place, folder: Path, processes: int) -> dict[str, str]:
    """Do the trials that are missing; says by its name why an experiment could not be done."""
    cores, undone = len(os.sched_getaffinity(0)), dict[str, str]()
    for plan in wanted:
        name = plan.experiment.name
        print(f"\n{plan.experiment.title}", flush=True)
        there = replace(place, scratch=place.scratch / name)
        try:
            do_trials(plan, profile, there, folder, processes=processes or min(cores, MOST), cores=cores)
        except (SystemExit, OSError, subprocess.SubprocessError) as error:
            undone[name] = str(error)
            print(f"not done: {error}", file=sys.stderr, flush=True)
    return undone


def _wanted(known: Sequence[Plan], only: Sequence[str] | None, profile: str) -> list[Plan]:
    names = [plan.experiment.name for plan in known]
    if strangers := sorted(set(only or ()).difference(names)):
        raise SystemExit(f"--only {', '.join(strangers)}: profile {profile} has {', '.join(names)}")
    return [plan for plan in known if only is None or plan.experiment.name in only]


def _report(wanted: Sequence[Plan], folder: Path, page: Path | None, profile: str) -> bool:
    """Print and save tables, gates and curves; says whether all gates hold."""
    results, gates = Results(folder), list[Gate]()
    told = [(plan.experiment, results.of(plan.experiment.name)) for plan in wanted]
    (folder / "results.jsonl").write_text("".join(line_of(result) for _, mine in told for result in mine))
    for experiment, mine in told:
        if experiment.name == "gates":
            gates += gates_of(mine, _exact(folder))
        if not mine:
            continue
        table = comparison(experiment, mine)
        if experiment.name == "sentiment":
            table += "\n" + by_site(experiment, mine, ("accuracy", "macro_f1"))
        print(f"\n{experiment.title}\n\n{table}")
        has_curves = save_curves(experiment, mine, folder / f"{experiment.name}.png")
        if page is not None:
            replace_section(page, experiment.name, _with_plot(experiment, folder, page, has_curves) + table)
    if gates:
        print(gates_table(gates))
        (folder / "gates.json").write_text(json.dumps([asdict(gate) for gate in gates], indent=2) + "\n")
        if page is not None:
            replace_section(page, "gates passed", gates_table(gates))
    if page is not None:
        shutil.copy(folder / "results.jsonl", _beside(page) / f"{profile}.jsonl")
    print(f"Results, tables and plots: {folder}")
    return all(gate.holds for gate in gates)


def _with_plot(experiment: Experiment, folder: Path, page: Path, has_curves: bool) -> str:
    """A page's picture of the curves, put beside the page."""
    if not has_curves:
        return ""
    shutil.copy(folder / f"{experiment.name}.png", _beside(page))
    return f"![{experiment.title}]({page.stem}/{experiment.name}.png)\n\n"


def _beside(page: Path) -> Path:
    """The folder of a page's plots and figures."""
    place = page.with_suffix("")
    place.mkdir(exist_ok=True)
    return place


def _exact(folder: Path) -> tuple[float, float] | None:
    path = exact_file(folder, "gates")
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


if __name__ == "__main__":
    typer.run(main)
