"""Processes that do an experiment's trials together, as many at the same time as the machine has cores.

A training of a small model does not fill two cores, and two of them do.
"""

import asyncio
import contextlib
import json
import logging
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from learning.ddp import difference_from_ddp
from learning.federation import federation
from learning.profiles import Place, Plan, plans
from learning.results import Results
from learning.trials import run_experiment
from learning.workbench import Workbench

MOST = 8
"""Processes by default, on machines with more cores."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a process is to do."""

    profile: str
    experiment: str
    place: Place
    results: Path
    threads: int
    is_first: bool
    """Whether it also does what is no trial."""


def exact_file(results: Path, experiment: str) -> Path:
    """How far a round of one step was from a step of DDP."""
    return results / f"{experiment}.exact.json"


def do_trials(plan: Plan, profile: str, place: Place, results: Path, *, processes: int, cores: int) -> None:
    """Do the trials of a plan that have no result yet.

    Raises:
        SystemExit: a process ended before its time, with what it has said.
    """
    Results(results).begin(plan.experiment.name)
    exact_file(results, plan.experiment.name).unlink(missing_ok=True)
    place.downloads.mkdir(parents=True, exist_ok=True)
    plan.fetch(place.downloads)
    count = 1 if plan.is_large else processes
    share = Share(
        profile=profile, experiment=plan.experiment.name, place=place, results=results,
        threads=max(1, cores // count), is_first=True,
    )  # fmt: skip
    with _children(share, count) as children:
        for child in children:
            child.join()
        if failed := [child for child in children if child.exitcode]:
            raise SystemExit(
                f"{len(failed)} of {count} processes of {plan.experiment.name} failed: see above"
            )


@contextlib.contextmanager
def _children(share: Share, count: int) -> Iterator[list[multiprocessing.process.BaseProcess]]:
    """Processes that end with the block, also where SIGTERM ends it."""
    start = multiprocessing.get_context("spawn").Process
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    children = [
        start(target=_work, args=(replace(share, is_first=not number, place=_own(share.place, number)),))
        for number in range(count)
    ]
    try:
        for child in children:
            child.start()
        yield children
    finally:
        for child in children:
            child.terminate()
            child.join()
        signal.signal(signal.SIGTERM, before)


def _own(place: Place, number: int) -> Place:
    return replace(place, scratch=place.scratch / f"worker-{number}")


def _work(share: Share) -> None:
    """Do trials until there are none."""
    logging.basicConfig(level=logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    plan = next(
        plan for plan in plans(share.profile, share.place) if plan.experiment.name == share.experiment
    )
    bench = Workbench(device=_device(), warm=plan.warm, threads=share.threads)
    asyncio.run(_try(plan, share, bench))
    bench.close()


async def _try(plan: Plan, share: Share, bench: Workbench) -> None:
    experiment, place = plan.experiment, share.place
    place.scratch.mkdir(parents=True)
    sites = plan.sites(place)
    async with federation(sites, bench, place.scratch / "federation") as running:
        exact = exact_file(share.results, experiment.name)
        if share.is_first and experiment.name == "gates":
            difference, step = await difference_from_ddp(running, experiment.setting, place.scratch / "ddp")
            exact.write_text(json.dumps({"difference": difference, "step": step}) + "\n")
        await run_experiment(experiment, running, sites, Results(share.results))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
