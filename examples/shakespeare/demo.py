"""Three sites with different plays train one GPT together, on this machine.

Real certificates, a real coordinator and three real client daemons, each a
process of its own; one site trains with two DDP ranks. Run by `make demo`;
`--help` tells what can be changed.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from report import losses, print_report, sample, save_plot
from rich.console import Console

from fedloom_server.console.export import MARKER

HERE = Path(__file__).resolve().parent
FEDLOOM = Path(sys.executable).with_name("fedloom")
SITES = {"comedies": 2, "histories": 1, "tragedies": 1}
"""Each site, which has the plays of its name, and how many DDP ranks it trains with."""
READY_S = 120
STOP_S = 15
MEASURE_ONLY = ("stop.target={metric: loss, value: 1000}", "evaluation.when=after_round")
"""Any model is that good: the run ends after the evaluation of its initial model."""

console = Console()


class Federation:
    """A coordinator and its sites as processes, in a folder."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self._kit = folder / "kit"
        self._logs = logs
        self._port = _free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def provision(self) -> None:
        """Make a CA, and a certificate and config for the coordinator, each site and an operator."""
        kit = ("--dir", str(self._kit))
        self._command("provision", "init", "--host", "localhost", "--port", str(self._port), *kit)
        for site in SITES:
            self._command("provision", "site", site, *kit)
        self._command("provision", "operator", "demo", *kit)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Every process runs inside the block, and none after it."""
        try:
            self._start("coordinator", self._kit / "coordinator/coordinator.yaml", "--keep-models", "1000",
                        "--listen", f"127.0.0.1:{self._port}")  # fmt: skip
            for site, ranks in SITES.items():
                source = {"format": "text", "files": [str(HERE / "texts" / site / "*.txt")]}
                data = json.dumps({"shakespeare": source, site: source})  # its own name: to train alone
                config = self._kit / f"sites/{site}/site.yaml"
                workers = ("--workers.nproc-per-node", str(ranks), "--workers.threads-per-rank", "1")
                self._start("client", config, "--data", data, *workers)
            self._wait_for_sites()
            yield
        finally:
            self._stop()

    def run(self, *overrides: str) -> str:
        """Submit the run and show it until it ends; returns its id."""
        arguments = [part for override in overrides for part in ("--set", override)]
        name = self.operator("submit", "--quiet", str(HERE / "run.yaml"), *arguments).strip()
        watched = subprocess.run([FEDLOOM, "run", "watch", name, *self._operator_config()], check=False)
        if watched.returncode:
            raise SystemExit(f"run {name} did not finish; the logs are in {self._logs}")
        return name

    def show(self, run: str) -> dict[str, Any]:
        """Everything that the coordinator knows of a run."""
        content: dict[str, Any] = json.loads(self.operator("show", run, "--json"))
        return content

    def operator(self, *arguments: str) -> str:
        """Give a `fedloom run` command as the operator."""
        return self._command("run", *arguments, *self._operator_config())

    def _operator_config(self) -> tuple[str, str]:
        return "--config", str(self._kit / "operators/demo/operator.yaml")

    def _command(self, *arguments: str) -> str:
        done = subprocess.run([FEDLOOM, *arguments], check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"`fedloom {' '.join(arguments)}` failed:\n{done.stderr}")
        return done.stdout

    def _start(self, command: str, config: Path, *flags: str) -> None:
        name = config.parent.name
        with (self._logs / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [FEDLOOM, command, "--config", config, *flags],
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this program alone, which then ends them in order
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )

    def _wait_for_sites(self) -> None:
        deadline_at_s = time.monotonic() + READY_S
        with console.status("Starting the coordinator and three sites"):
            while time.monotonic() < deadline_at_s:
                for name, process in self._processes.items():
                    if process.poll() is not None:
                        log = (self._logs / f"{name}.log").read_text()
                        raise SystemExit(f"{name} ended at its start:\n{log[-2000:]}")
                listed = subprocess.run(
                    [FEDLOOM, "sites", "list", "--json", *self._operator_config()],
                    check=False, capture_output=True, text=True,
                )  # fmt: skip
                sites = json.loads(listed.stdout) if listed.returncode == 0 else []
                if sum(site["connected"] for site in sites) == len(SITES):
                    return
                time.sleep(0.5)
        raise SystemExit(f"the sites did not attach within {READY_S} s; the logs are in {self._logs}")

    def _stop(self) -> None:
        """End sites first, so that none looks for a coordinator that has gone; a second Ctrl-C must wait."""
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        for process in reversed(self._processes.values()):
            process.terminate()
        deadline_at_s = time.monotonic() + STOP_S
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline_at_s - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of federated training.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each site in a round.")] = 24,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also let each site train alone for the same steps.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for the model, plot, logs and figures.")] = Path(
        "demo-output"
    ),
) -> None:
    """Train a small GPT on three sites' plays, and show what came of it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end what was started, as Ctrl-C does
    _remove_model(output / "model")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedloom-demo-") as scratch:
        federation = Federation(Path(scratch), output / "logs")
        with console.status("Making certificates"):
            federation.provision()
        with federation.running():
            content = play(federation, rounds, steps, compare, Path(scratch), output)
    fell = report(content, output)
    raise SystemExit(0 if fell else "the loss did not fall: see the table above and the logs")


def _remove_model(folder: Path) -> None:
    """Remove the model of an earlier demo; what else may lie there is the user's."""
    if folder.exists() and not (folder / MARKER).is_file():
        raise SystemExit(f"{folder} is there and no model of a demo's: give --output another folder")
    shutil.rmtree(folder, ignore_errors=True)


def play(
    federation: Federation, rounds: int, steps: int, compare: bool, scratch: Path, output: Path
) -> dict[str, Any]:
    """Everything that needs the federation: the run, its models, and the runs to compare with."""
    run = federation.run(f"rounds={rounds}", f"local.steps={steps}")
    federation.operator("export", run, "--to", str(output / "model"))
    federation.operator("export", run, "--round", "0", "--to", str(scratch / "initial"))
    alone: dict[str, Any] = {}
    for site in SITES if compare else ():
        console.rule(f"{site} trains alone for the same {rounds * steps} steps")
        lonely = federation.run(
            f"name=alone-{site}",
            f"data={site}",
            f"rounds={rounds}",
            f"local.steps={steps}",
            "cohort.min_sites=1",
        )
        model = scratch / f"alone-{site}"
        federation.operator("export", lonely, "--to", str(model))
        measured = federation.run(
            f"name=measure-{site}", f"model={{path: {model}}}", "rounds=1", *MEASURE_ONLY
        )
        alone[site] = losses(federation.show(measured))[0]
    with console.status("Writing samples"):
        samples = {"before": sample(scratch / "initial"), "after": sample(output / "model")}
    content = {"run": federation.show(run), "alone": alone, "samples": samples}
    (output / "figures.json").write_text(json.dumps(content, indent=2))
    return content


def report(content: dict[str, Any], output: Path) -> bool:
    """Show and save what came of it; says whether the loss fell."""
    by_round = losses(content["run"])
    save_plot(by_round, output / "loss.png")
    print_report(console, content)
    console.print(f"\nPlot of the loss: {output / 'loss.png'}", soft_wrap=True)
    console.print(f"Model, for AutoModelForCausalLM.from_pretrained: {output / 'model'}", soft_wrap=True)
    return by_round[max(by_round)]["overall"] < by_round[0]["overall"]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    typer.run(main)
