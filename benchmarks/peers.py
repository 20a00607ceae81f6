"""fedloom beside Flower and NVIDIA FLARE: the same null-training rounds, on one machine in one run.

Run by `make bench-peers`; docs/benchmarks.md tells the method. Each peer gets a virtual environment of its
own, with the version named in its module, and is deployed as its users do: no simulation.
"""

import json
import re
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from environments import default_folder, make_environment
from federation import run_null_training
from guard import MemoryGuard
from machine import disk_bytes_per_s, machine_facts, require_room
from nulltraining import SIZES, Case, Figures, matrix, size_bytes
from peer import Deployment, run_peer
from peer_flower import FlowerDeployment
from peer_nvflare import NvflareDeployment
from peer_tables import OURS, WIDTH, Outcome, as_data, notes, save_plot, table
from rich.console import Console

from fedloom_common.errors import FederationError

PACKAGES = ("fedloom", "grpcio", "numpy", "protobuf")
PEERS: dict[str, type[Deployment]] = {"flower": FlowerDeployment, "nvflare": NvflareDeployment}
SCRATCH = Path(tempfile.gettempdir())
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""What the peers' logs, which tell of failures, are full of."""

Run = Callable[[Case, Path], Figures]
"""Measures one case in a folder that is empty; SystemExit says why it could not."""

console = Console(stderr=True)


def measure(system: str, run: Run, case: Case, scratch: Path, *, memory_bytes: int | None) -> Outcome:
    """One case of one system; that it fails is an outcome, too."""
    guard = MemoryGuard(memory_bytes)
    try:
        require_room(scratch, disk_bytes=case.disk_bytes)
        with tempfile.TemporaryDirectory(prefix="fedloom-bench-", dir=scratch) as folder, guard:
            figures = run(case, Path(folder))
    except (SystemExit, FederationError, OSError) as error:
        return Outcome(system=system, case=case, failure=guard.reason or COLOUR.sub("", str(error)))
    return Outcome(system=system, case=case, figures=figures)


def measure_all(
    cases: Sequence[Case], runs: Mapping[str, Run], scratch: Path, *, memory_bytes: int | None
) -> Iterator[list[Outcome]]:
    """Each case's outcomes, one system after the other."""
    for case in cases:
        outcomes = []
        for name, run in runs.items():
            system = PEERS[name].system if name in PEERS else OURS
            console.log(f"{case.name}: {system}")
            outcomes.append(measure(system, run, case, scratch, memory_bytes=memory_bytes))
            if outcomes[-1].failure:
                console.log(outcomes[-1].failure, markup=False)
        yield outcomes


def our_run(round_limit_s: float) -> Run:
    """fedloom, from the tree that this program lies in."""
    return lambda case, folder: run_null_training(
        case, folder / "run", own_loopback=False, round_limit_s=round_limit_s
    )


def peer_run(peer: type[Deployment], environments: Path, round_limit_s: float) -> Run:
    """A peer, in an environment that is made now; where that fails, every case fails for that reason."""
    console.log(f"{peer.system}: environment for {' and '.join(peer.requirements)}")
    try:
        environment = make_environment(environments / peer.package, peer.requirements)
    except SystemExit as error:
        reason = str(error)

        def fail(case: Case, folder: Path) -> Figures:
            raise SystemExit(reason)

        return fail
    return lambda case, folder: run_peer(
        peer(environment, folder, case.sites), case, folder, round_limit_s=round_limit_s
    )


def main(
    sizes: Annotated[str, typer.Option(help="Model sizes, as 10MB,1.5GB.")] = ",".join(SIZES),
    sites: Annotated[str, typer.Option(help="Numbers of sites.")] = "2,4,8",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; the first is not counted.")] = 4,
    systems: Annotated[str, typer.Option(help="What is measured, in this order.")] = ",".join((OURS, *PEERS)),
    memory: Annotated[
        str, typer.Option(help="A case that takes more is stopped, as 16GB; default: what is free less 2GB.")
    ] = "",
    round_limit: Annotated[float, typer.Option(help="Seconds after which a round is given up.")] = 600.0,
    environments: Annotated[
        Path | None, typer.Option(help="Folder where the peers' environments are kept.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="10MB and 200MB with 2 and 4 sites.")] = False,
    scratch: Annotated[Path, typer.Option(help="Folder for models and logs; removed at the end.")] = SCRATCH,
    output: Annotated[Path | None, typer.Option("--json", help="File for the figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a plot, .png or .svg.")] = None,
) -> None:
    """Measure fedloom and its peers side by side, and print one table."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end what was started, as Ctrl-C does
    names = _known(systems)
    pairs = matrix("10MB,200MB" if quick else sizes, "2,4" if quick else sites)
    memory_bytes = _memory(memory)
    # Programs that run elsewhere are given these paths.
    folder, scratch = (environments or default_folder()).resolve(), scratch.resolve()
    runs = {
        name: our_run(round_limit) if name == OURS else peer_run(PEERS[name], folder, round_limit)
        for name in names
    }
    facts = machine_facts(PACKAGES) | {"scratch_bytes_per_s": disk_bytes_per_s(scratch)}
    facts["versions"] |= {PEERS[name].package: PEERS[name].version for name in names if name in PEERS}
    cases = [Case(model_bytes=size, sites=count, rounds=rounds) for size, count in pairs]
    outcomes: list[Outcome] = []
    for members in measure_all(cases, runs, scratch, memory_bytes=memory_bytes):
        outcomes += members
        facts["load_after"] = machine_facts(())["load"]
        if output is not None:
            output.write_text(json.dumps({"machine": facts, "cases": as_data(outcomes)}, indent=2) + "\n")
    shown = Console(width=WIDTH)
    shown.print(table(outcomes, facts))
    shown.print(*notes(outcomes), sep="\n", markup=False)
    if plot is not None:
        save_plot(outcomes, plot)


def _known(systems: str) -> Sequence[str]:
    names = list(dict.fromkeys(systems.split(",")))
    known = (OURS, *PEERS)
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{', '.join(unknown)} is not known; wanted some of {','.join(known)}")
    return names


def _memory(text: str) -> int | None:
    try:
        return size_bytes(text) if text else None
    except ValueError as error:
        raise typer.BadParameter(f"{error}; wanted a size such as --memory 16GB") from error


if __name__ == "__main__":
    typer.run(main)
