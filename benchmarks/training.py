"""What fedloom's trainer makes of a site's devices: tokens/s beside a plain torch loop and HF Trainer.

Run by `make bench-training`; docs/benchmarks.md tells the method. `--help` tells what can be chosen.
"""

import asyncio
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from environments import default_folder, make_packages
from machine import machine_facts
from processes import free_port
from rich import box
from rich.console import Console
from rich.table import Table
from trainer_rank import Task

from fedloom_common.runspec import RunSpec
from fedloom_common.tensors import Manifest
from fedloom_server.models import MODEL_FILE, prepare_model

ACCELERATE = "accelerate==1.15.0"
PACKAGES = ("fedloom", "torch", "transformers", "accelerate")
OURS, PLAIN, PEER = "fedloom", "plain torch", "HF Trainer"
NAMES = {OURS: "fedloom", PLAIN: "plain", PEER: "peer"}
COLUMNS = ("model, ranks", OURS, PLAIN, PEER, "of plain", "of HF", "of plain, CPU", "of HF, CPU", "MFU")
SHAPES = {  # layers, width, heads, context, examples in a batch
    "small": (4, 128, 4, 128, 32),
    "medium": (6, 384, 6, 256, 4),
    "gpt2": (12, 768, 12, 1024, 16),
}
STEPS = {"small": 4, "medium": 2, "gpt2": 30}
"""In a turn: a second or two."""
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16, as the maker's data sheets say; of the SXM form where there are several."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One model on so many ranks."""

    model: str
    ranks: int
    tokens: int
    """In a turn."""
    seconds: dict[str, list[float]]
    """Of every turn that counts, by trainer."""
    cpu_seconds: dict[str, list[float]]
    """Of all ranks' processes in the same turns."""
    flops: float
    """Of a token's forward and backward pass."""

    def tokens_per_s(self, name: str) -> float:
        """Median over the turns."""
        return self.tokens / statistics.median(self.seconds[name])

    def ratio(self, name: str, of: dict[str, list[float]]) -> float:
        """fedloom's speed by another's: median over pairs of turns that followed each other."""
        return statistics.median(other / ours for ours, other in zip(of[OURS], of[name], strict=True))


def main(
    models: Annotated[str, typer.Option(help=f"Some of {','.join(SHAPES)}.")] = "",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, such as 1,2.")] = "",
    turns: Annotated[int, typer.Option(help="Turns of each trainer that count.", min=1)] = 25,
    threads: Annotated[int, typer.Option(help="CPU threads of a rank; the cores shared if 0.")] = 0,
    peer: Annotated[bool, typer.Option(help="Whether HF Trainer takes part.")] = True,
    packages: Annotated[Path | None, typer.Option(help="Folder where accelerate is kept.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File for the figures as JSON.")] = None,
) -> None:
    """Let the trainers take turns on one model, and print one table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = (models or ("gpt2" if device == "cuda" else "small,medium")).split(",")
    counts = [int(count) for count in (ranks or ("1" if device == "cuda" else "1,2")).split(",")]
    if unknown := [name for name in names if name not in SHAPES]:
        raise typer.BadParameter(f"{', '.join(unknown)} is not known; wanted some of {','.join(SHAPES)}")
    folder = (packages or default_folder() / "accelerate").resolve()
    paths = [make_packages(folder, [ACCELERATE])] if peer else []
    facts, found = machine_facts(PACKAGES), []
    facts["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    facts["versions"]["accelerate"] = ACCELERATE.rpartition("=")[2]
    for name in names:
        for count in counts:
            share = threads or max(1, facts["cores"] // count)
            with tempfile.TemporaryDirectory() as scratch:
                one = _measure(
                    name, count, Path(scratch), turns=turns, threads=share, device=device, paths=paths
                )
            found.append(one)
            facts["load_after"] = machine_facts(())["load"]
            if output is not None:
                cases = [asdict(one) for one in found]
                output.write_text(json.dumps({"machine": facts, "cases": cases}, indent=2) + "\n")
    Console(width=130).print(_table(found, facts))


def _measure(
    name: str, ranks: int, scratch: Path, *, turns: int, threads: int, device: str,
    paths: list[Path],
) -> Figures:  # fmt: skip
    layers, width, _, context, batch = SHAPES[name]
    steps = STEPS[name]
    spec = _spec(name, steps=steps, rounds=turns + 1)
    asyncio.run(prepare_model(spec, scratch / "assets"))
    parameters = sum(info.size_bytes // 4 for info in Manifest.read(scratch / "assets" / MODEL_FILE).tensors)
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=4 * context * batch * 64)
    (scratch / "text.txt").write_text("".join(letters))
    flops = 6 * parameters + 12 * layers * width * context  # attention's products are not in the parameters
    task = _task(spec, scratch, steps=steps, turns=turns, threads=threads, device=device)
    taken = _take_turns(ranks, scratch, task, paths)
    return Figures(
        model=name, ranks=ranks, tokens=steps * batch * context, flops=flops,
        seconds={who: [one[0] for one in times] for who, times in taken.items()},
        cpu_seconds={who: [one[1] for one in times] for who, times in taken.items()},
    )  # fmt: skip


class Contender:
    """One of the trainers, in processes of its own that wait for their turns."""

    def __init__(self, name: str, ranks: int, scratch: Path, task: Task, paths: Sequence[Path]) -> None:
        file, self._log = scratch / "task.json", scratch / f"{name}.log"
        file.with_suffix(f".{name}").unlink(missing_ok=True)
        path = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
        common = os.environ | {
            "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(task.threads),
            "OMP_WAIT_POLICY": "PASSIVE", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).with_name("trainer_rank.py")), str(file), name]
        with self._log.open("w") as log:
            self._processes = [
                subprocess.Popen(
                    command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=log, text=True,
                )
                for rank in range(ranks)
            ]  # fmt: skip

    def begin(self) -> None:
        """Take up the packed texts, and have a turn that does not count."""
        for process in self._processes:
            print(file=process.stdin, flush=True)
        self.turn()

    def turn(self) -> tuple[float, float]:
        """Seconds of the slowest rank, and CPU seconds of all, of one turn."""
        for process in self._processes:
            print(file=process.stdin, flush=True)
        told = [self._hear(process) for process in self._processes]
        return max(one[0] for one in told), sum(one[1] for one in told)

    def end(self) -> None:
        """Ask for no more; the ranks leave together."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait()

    def _hear(self, process: "subprocess.Popen[str]") -> tuple[float, float]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("turn "):
                _, seconds, cpu_seconds = line.split()
                return float(seconds), float(cpu_seconds)
        raise SystemExit(f"a rank ended; its last lines:\n{self._log.read_text()[-3000:]}")


def _take_turns(
    ranks: int, scratch: Path, task: Task, paths: Sequence[Path]
) -> dict[str, list[tuple[float, float]]]:
    """What every turn that counts took, by trainer; one more comes before them."""
    shutil.rmtree(task.scratch, ignore_errors=True)
    (scratch / "task.json").write_text(json.dumps(asdict(task)))
    names = NAMES if paths else {name: command for name, command in NAMES.items() if name != PEER}
    contenders = {name: Contender(command, ranks, scratch, task, paths) for name, command in names.items()}
    for contender in contenders.values():
        contender.begin()  # fedloom packs the texts in its first, for all
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(task.turns):
        order = list(names)[number % len(names) :] + list(names)[: number % len(names)]
        for name in order:
            taken[name].append(contenders[name].turn())
    for contender in contenders.values():
        contender.end()
    return taken


def _task(spec: RunSpec, scratch: Path, **rest: Any) -> Task:
    assets = scratch / "assets"
    return Task(
        assets=str(assets), model=str(assets / MODEL_FILE), text=str(scratch / "text.txt"),
        scratch=str(scratch / "work"), spec=spec.model_dump(mode="json"), **rest,
    )  # fmt: skip


def _spec(name: str, *, steps: int, rounds: int) -> RunSpec:
    layers, width, heads, context, batch = SHAPES[name]
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": context}
    return RunSpec.model_validate({
        "name": name, "model": {"config": {"model_type": "gpt2"} | shape, "tokenizer": "bytes"},
        "data": "texts", "rounds": rounds,
        "task": {"context_tokens": context}, "local": {"steps": steps, "batch_examples": batch},
    })  # fmt: skip


def _table(found: list[Figures], facts: dict[str, Any]) -> Table:
    made = Table(title="Training, tokens/s: medians over turns", box=box.SIMPLE_HEAD, title_justify="left")
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    made.caption_justify = "left"
    made.caption = (
        f"{facts['at']}: {facts['cores']} cores of {facts['processor']}, {facts['device']}, {versions}; "
        f"load {facts['load']:.1f} before, {facts['load_after']:.1f} after"
    )
    for number, column in enumerate(COLUMNS):
        made.add_column(column, justify="right" if number else "left")
    for one in found:
        names = [name for name in (OURS, PLAIN, PEER) if name in one.seconds]
        speeds = [f"{one.tokens_per_s(name):,.0f}" if name in names else "" for name in (OURS, PLAIN, PEER)]
        ratios = [
            f"{one.ratio(name, of):.3f}" if name in names else ""
            for of in (one.seconds, one.cpu_seconds)
            for name in (PLAIN, PEER)
        ]
        made.add_row(f"{one.model}, {one.ranks}", *speeds, *ratios, utilisation(one, facts["device"]))
    return made


def utilisation(one: Figures, device: str) -> str:
    """Model FLOP utilisation: what the model's arithmetic is of what the devices can do."""
    words = re.findall(r"\w+", device)  # of "NVIDIA L40S", or "NVIDIA A100-SXM4-80GB"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in words), None)
    return "" if peak is None else f"{one.tokens_per_s(OURS) * one.flops / (peak * one.ranks):.2f}"


if __name__ == "__main__":
    typer.run(main)
