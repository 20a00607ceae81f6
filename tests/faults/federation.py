"""A coordinator and sites in processes of their own, with certificates, and proxies on the way between."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from faults.nullsite import Training
from faults.proxy import Proxy
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedloom.v1.runs_pb2 import (
    RUN_STATE_FAILED,
    RUN_STATE_FINISHED,
    RUN_STATE_STOPPED,
    GetResponse,
    ResumeRequest,
    SubmitRequest,
)
from fedloom_common.errors import AttemptFailed
from fedloom_server.console.connection import Coordinator, Operator
from fedloom_server.console.kit import create_kit

HERE = Path(__file__).resolve().parent
FEDLOOM = Path(sys.executable).with_name("fedloom")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
POLL_S = 0.1
START_S = 120.0
ENDS = (RUN_STATE_FINISHED, RUN_STATE_FAILED, RUN_STATE_STOPPED)

GPT2_8MB = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 256,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 4500,
}
"""Eight chunks on the wire."""


class Federation:
    """Sites and their coordinator: each can be started, paused and killed."""

    def __init__(self, folder: Path, port: int, sites: Sequence[str] = ("oslo",)) -> None:
        self.folder = folder
        self.kit = folder / "kit"
        self.port = port
        self.sites = tuple(sites)
        self.ports: dict[str, int] = {}
        """Where sites dial, if not the coordinator's own port: a proxy's."""
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._environment: dict[str, str] = dict(ENVIRONMENT)
        made = create_kit(self.kit, federation="faults", hosts=["localhost"], port=port)
        made.add_operator("ann")
        for site in sites:
            made.add_site(site)
            (self.site_folder(site) / "data").mkdir()
            (self.site_folder(site) / "data/a.txt").write_text("to be or not to be")
            self.train(site)

    @property
    def state(self) -> Path:
        """The coordinator's state folder."""
        return self.kit / "coordinator/state"

    def site_folder(self, site: str) -> Path:
        return self.kit / "sites" / site

    def configure(self, name: str, **changes: object) -> None:
        """Change the config of the coordinator or a site before its next start."""
        path = (
            self.kit / "coordinator/coordinator.yaml"
            if name == "coordinator"
            else self.site_folder(name) / "site.yaml"
        )
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))

    def train(self, site: str, **how: Any) -> None:
        """Say how a site trains after its next start: see ``Training``."""
        log = str(self.folder / "trainings.jsonl")
        Training(site=site, log=log, **how).save(self.site_folder(site) / "training.json")

    @contextlib.contextmanager
    def environment_of(self, more: Mapping[str, str]) -> Iterator[None]:
        """Processes that are started inside have more in their environment."""
        before, self._environment = self._environment, self._environment | more
        try:
            yield
        finally:
            self._environment = before

    def start_coordinator(self, wrapper: Sequence[str] = ()) -> None:
        config = self.kit / "coordinator/coordinator.yaml"
        listen = f"127.0.0.1:{self.port}"
        self.start("coordinator", [*wrapper, FEDLOOM, "coordinator", "--config", config, "--listen", listen])

    def start_site(self, site: str = "oslo", wrapper: Sequence[str] = ()) -> None:
        """Start a daemon."""
        self.configure(site, coordinator=f"localhost:{self.ports.get(site, self.port)}")
        folder = self.site_folder(site)
        command = [sys.executable, HERE / "nullsite.py", folder / "training.json", folder / "site.yaml"]
        self.start(site, [*wrapper, *command])

    def start_sites(self) -> None:
        for site in self.sites:
            self.start_site(site)

    def start(self, name: str, command: Sequence[str | Path]) -> None:
        """Start a process under a name."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """End a process as the kernel does when memory runs out."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for name in list(self.running):
            process = self.running.pop(name)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """The end of every log, to be told when something fails."""
        return "\n".join(f"== {name}\n{self.log(name)[-3000:]}" for name in ("coordinator", *self.sites))

    async def submit(self, model_config: Mapping[str, object] = GPT2_8MB, **changes: object) -> str:
        """Submit a run as soon as the coordinator answers; gives its id."""
        spec = {
            "name": "faults",
            "model": {"config": dict(model_config), "tokenizer": "bytes"},
            "data": "texts",
            "rounds": 1,
            "local": {"steps": 16, "batch_examples": 1},
            "evaluation": {"every_rounds": 0, "initial": False},
            **changes,
        }
        await self.answered()
        async with self.operator() as coordinator:
            run = await coordinator.call_at_length(
                coordinator.runs.Submit, SubmitRequest(spec=json.dumps(spec))
            )
            return str(run.id)

    async def until(self, holds: Callable[[], bool], seconds: float = START_S) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not holds():  # noqa: ASYNC110 (any condition at all)
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(self.logs()) from None

    async def get(self, run: str) -> GetResponse | None:
        """The run and its rounds; None while the coordinator does not answer."""
        with contextlib.suppress(AttemptFailed):
            async with self.operator() as coordinator:
                return await coordinator.run_with_rounds(run)
        return None

    async def ended(self, run: str, seconds: float) -> GetResponse:
        """The run, as soon as it has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    answer = await self.get(run)
                    if answer is not None and answer.run.state in ENDS:
                        return answer
                    await asyncio.sleep(POLL_S)
        raise AssertionError(f"the run has not ended within {seconds:g} s\n{self.logs()}")

    async def finished(self, run: str, seconds: float) -> GetResponse:
        """The run, as soon as it has ended well."""
        answer = await self.ended(run, seconds)
        assert answer.run.state == RUN_STATE_FINISHED, f"{answer.run.reason}\n{self.logs()}"
        return answer

    async def ended_after_resumes(self, run: str, seconds: float) -> GetResponse:
        """The run, as soon as it has ended well; an operator resumes it if it fails."""
        async with asyncio.timeout(seconds):
            while (answer := await self.ended(run, seconds)).run.state != RUN_STATE_FINISHED:
                async with self.operator() as coordinator:
                    await coordinator.call(coordinator.runs.Resume, ResumeRequest(run_id=run))
        return answer

    async def attached(self, count: int, seconds: float = START_S) -> None:
        """Wait until so many sites are connected."""
        async with asyncio.timeout(seconds):
            while await self.connected() != count:  # noqa: ASYNC110 (another process tells)
                await asyncio.sleep(POLL_S)

    async def connected(self) -> int:
        """How many sites are connected; 0 while the coordinator does not answer."""
        with contextlib.suppress(AttemptFailed):
            async with self.operator() as coordinator:
                return sum(site.connected for site in await coordinator.all_sites())
        return 0

    def model(self, digest: str) -> dict[str, NDArray[np.float32]]:
        found: dict[str, NDArray[np.float32]] = load_file(self.model_path(digest))
        return found

    def model_path(self, digest: str) -> Path:
        return self.state / "files" / digest.replace(":", "-")

    def operator(self) -> "AbstractAsyncContextManager[Coordinator]":
        return Operator(config=self.kit / "operators/ann/operator.yaml").connect()

    async def answered(self) -> None:
        """Wait until the coordinator answers."""
        async with asyncio.timeout(START_S):
            while True:
                with contextlib.suppress(AttemptFailed):
                    async with self.operator() as coordinator:
                        await coordinator.all_runs()
                        return
                await asyncio.sleep(POLL_S)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@asynccontextmanager
async def federation_of(folder: Path, *sites: str) -> AsyncIterator[Federation]:
    """Sites and a coordinator of which nothing runs yet; everything ends with the block."""
    federation = Federation(folder, free_port(), sites)
    try:
        yield federation
    finally:
        federation.stop()


@asynccontextmanager
async def federation_through(folder: Path) -> AsyncIterator[tuple[Federation, Proxy]]:
    """A running coordinator and a running site that negates, and the proxy between them."""
    async with federation_of(folder, "oslo") as federation:
        federation.start_coordinator()
        federation.train("oslo", negates=True)
        async with Proxy(federation.port) as proxy:
            federation.ports["oslo"] = proxy.port
            federation.start_site()
            yield federation, proxy
