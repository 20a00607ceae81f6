"""A federation of real processes and certificates over loopback, driven by the commands that a user types."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from fedloom_common.cli import main

FEDLOOM = Path(sys.executable).with_name("fedloom")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Processes:
    """A coordinator and sites, each with its part of one kit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kit = folder / "kit"
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self("provision", "init", "--host", "localhost", "--port", str(self.port))
        self("provision", "operator", "ann")

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """Run a command to its end; its standard output, and its error if a failure is expected.

        In this process: to start another one takes longer than most commands.
        """
        place = ("--dir", str(self.kit)) if arguments[0] == "provision" else self.config()
        ended, output, errors = _ended([*arguments, *place])
        assert ended == status, (arguments, ended, output, errors)
        return output if status == 0 else errors

    def config(self) -> tuple[str, str]:
        return "--config", str(self.kit / "operators/ann/operator.yaml")

    def coordinator(self, *flags: str) -> None:
        config = self.kit / "coordinator/coordinator.yaml"
        self._start("coordinator", "coordinator", config, *flags)
        self.until(lambda: _ended(["coordinator", "health", "--config", str(config)])[0] == 0)

    def site(self, name: str, files: dict[str, str], *flags: str) -> None:
        """Provision a site, give it data, start its daemon."""
        self("provision", "site", name)
        folder = self.kit / "sites" / name
        for file, text in files.items():
            (folder / "data").mkdir(exist_ok=True)
            (folder / "data" / file).write_text(text)
        self.start_site(name, *flags)

    def start_site(self, name: str, *flags: str) -> None:
        self._start(
            name, "client", self.kit / "sites" / name / "site.yaml", "--workers.threads-per-rank", "1", *flags
        )

    def _start(self, name: str, command: str, config: Path, *flags: str) -> None:
        self.spawn(name, FEDLOOM, command, "--config", config, *flags)

    def spawn(self, name: str, *command: str | Path) -> None:
        """Start a process of any kind that belongs to the federation."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=ENVIRONMENT
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def submit(self, spec: dict[str, Any]) -> str:
        path = self.folder / f"{spec['name']}.yaml"
        path.write_text(json.dumps(spec))
        return self("run", "submit", str(path)).strip()

    def show(self, run: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self("run", "show", run, "--json"))
        return content

    def until(self, holds: Callable[[], bool], seconds: float = 100) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "\n".join(
                f"== {n}\n{self.log(n)[-3000:]}" for n in self.running
            )
            time.sleep(0.2)

    def attached(self, count: int) -> None:
        def enough() -> bool:
            return sum(site["connected"] for site in json.loads(self("sites", "list", "--json"))) == count

        self.until(enough)

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        process = self.running.pop(name)
        process.send_signal(how)
        process.wait(30)

    def stop(self) -> dict[str, int]:
        """Ask every process to end; their exit statuses."""
        for process in self.running.values():
            process.terminate()
        statuses = {}
        for name, process in self.running.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            statuses[name] = process.wait()
        self.running.clear()
        return statuses


def _ended(arguments: list[str]) -> tuple[int, str, str]:
    """A command's status, standard output and standard error; in a thread, as a test's may have a loop."""
    output, errors = io.StringIO(), io.StringIO()

    def run() -> int:
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    with (
        patch.object(sys, "argv", ["fedloom", *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        ThreadPoolExecutor(1) as alone,
    ):
        return alone.submit(run).result(), output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("federation"))
    yield processes
    processes.stop()
