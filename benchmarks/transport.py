"""What fedloom's transport costs: null-training rounds beside bare gRPC and raw TCP, in one run.

Run by `make bench`; docs/benchmarks.md tells the method. `--quick` takes some minutes, the whole most of an
hour, and `--help` tells what can be chosen.
"""

import json
import logging
import signal
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from bare import Bare, BareTransfers
from bare_process import Kind
from federation import run_null_training
from machine import disk_bytes_per_s, machine_facts, require_room
from measure import MB
from nulltraining import SIZES, Case, Figures, matrix
from processes import take_own_loopback
from rich.console import Console
from tables import WIDTH, save_plot, table

from fedloom_server.console.kit import create_kit

PACKAGES = ("fedloom", "grpcio", "numpy", "protobuf")
TRANSFERS = {"small": 3, "large": 1}
"""Repetitions of each bare transfer, before fedloom's rounds and again after them."""
LARGE_BYTES = 500 * MB
KINDS: tuple[tuple[Kind, bool], ...] = (
    ("tcp sink", False),
    ("tcp accumulate", False),
    ("grpc upload", True),
    ("grpc broadcast", True),
    ("grpc upload", False),
    ("grpc broadcast", False),
)
"""What is measured bare, with or without TLS."""

SCRATCH = Path(tempfile.gettempdir())

console = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One case: fedloom's figures and the floor under them."""

    figures: list[Figures]
    """With TLS, and without if that was asked for."""
    bare: list[Bare]

    def floor_s(self, kind: Kind, *, tls: bool) -> float:
        """Median seconds of a bare transfer."""
        return next(bare.seconds.median for bare in self.bare if (bare.kind, bare.tls) == (kind, tls))

    def ratios(self, figures: Figures) -> dict[str, float]:
        """Bare gRPC's time by fedloom's, with TLS or without as fedloom has it: 1 is as fast as can be."""
        down_s = self.floor_s("grpc broadcast", tls=figures.tls)
        up_s = self.floor_s("grpc upload", tls=figures.tls)
        ratios = {}
        if figures.round_s is not None:
            ratios["round"] = (down_s + up_s) / figures.round_s.median
        if "broadcast_s" in figures.extra:
            ratios["broadcast"] = down_s / figures.extra["broadcast_s"].median
            ratios["upload_fold"] = up_s / figures.extra["upload_fold_s"].median
        return ratios


def compare(case: Case, folder: Path, *, plain: bool, own_loopback: bool) -> Comparison:
    """Measure a case: bare transfers, fedloom, and the bare transfers again, as machines have moods."""
    kit = create_kit(folder / "bare-kit", federation="benchmark", hosts=["localhost"])
    kit.add_site("site-1")
    bare = [
        BareTransfers(
            kind,
            model_bytes=case.model_bytes,
            sites=case.sites,
            credentials=folder / "bare-kit" if tls else None,
        )
        for kind, tls in KINDS
    ]
    times = TRANSFERS["large" if case.model_bytes > LARGE_BYTES else "small"]
    for transfers in bare:
        transfers.repeat(times, folder / "bare-logs")
    cases = [case, replace(case, tls=False)] if plain else [case]
    figures = []
    for number, one in enumerate(cases):
        console.log(f"{one.name}: fedloom")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            figures.append(run_null_training(one, Path(scratch) / str(number), own_loopback=own_loopback))
    console.log(f"{case.name}: bare, again")
    for transfers in bare:
        transfers.repeat(times, folder / "bare-logs")
    return Comparison(figures=figures, bare=[transfers.result() for transfers in bare])


def as_data(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON has it."""
    return {
        "fedloom": [asdict(f) | {"of_bare": comparison.ratios(f)} for f in comparison.figures],
        "bare": [asdict(bare) for bare in comparison.bare],
    }


def main(
    sizes: Annotated[str, typer.Option(help="Model sizes, as 10MB,1.5GB.")] = ",".join(SIZES),
    sites: Annotated[str, typer.Option(help="Numbers of sites.")] = "2,4,8",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; the first is not counted.")] = 4,
    rounds_in_step: Annotated[
        int, typer.Option(min=0, help="Further rounds in which the way down and the way up are told apart.")
    ] = 2,
    plain: Annotated[bool, typer.Option(help="Also measure fedloom without TLS.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="10MB and 200MB with 2 and 4 sites.")] = False,
    scratch: Annotated[
        Path, typer.Option(help="Folder for models and updates; removed at the end.")
    ] = SCRATCH,
    output: Annotated[Path | None, typer.Option("--json", help="File for the figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a plot, .png or .svg.")] = None,
) -> None:
    """Measure fedloom's transport against bare gRPC and raw TCP, and print one table."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end what was started, as Ctrl-C does
    logging.getLogger("fedloom_common.channels").setLevel(logging.ERROR)  # that there is no TLS is meant
    own_loopback = take_own_loopback()
    if not own_loopback:
        console.log("no network namespace of its own: bytes over loopback are not counted")
    cases = [
        Case(model_bytes=size, sites=count, rounds=rounds, rounds_in_step=rounds_in_step)
        for size, count in matrix("10MB,200MB" if quick else sizes, "2,4" if quick else sites)
    ]
    for case in cases:
        require_room(scratch, disk_bytes=case.disk_bytes, memory_bytes=case.memory_bytes)
    facts = machine_facts(PACKAGES) | {"scratch_bytes_per_s": disk_bytes_per_s(scratch)}
    comparisons = []
    for case in cases:
        console.log(f"{case.name}: bare")
        with tempfile.TemporaryDirectory(prefix="fedloom-bench-", dir=scratch) as folder:
            comparisons.append(compare(case, Path(folder), plain=plain, own_loopback=own_loopback))
        facts["load_after"] = machine_facts(())["load"]
        if output is not None:
            content = {"machine": facts, "cases": [as_data(comparison) for comparison in comparisons]}
            output.write_text(json.dumps(content, indent=2) + "\n")
    Console(width=WIDTH).print(table(comparisons, facts))
    if plot is not None:
        save_plot(comparisons, plot)


if __name__ == "__main__":
    typer.run(main)
