"""A coordinator and a site in processes of their own, with certificates, and a proxy on the way between."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import numpy as np
import yaml
from faults.proxy import Proxy
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedloom.v1.runs_pb2 import RUN_STATE_FINISHED, GetRequest, GetResponse, ListRequest
from fedloom_common.errors import Unreachable
from fedloom_server.console.connection import Coordinator, Operator
from fedloom_server.console.kit import create_kit

HERE = Path(__file__).resolve().parent
FEDLOOM = Path(sys.executable).with_name("fedloom")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
POLL_S = 0.2
START_S = 120.0


class Federation:
    """One site and its coordinator."""

    def __init__(self, folder: Path, port: int) -> None:
        self.kit = folder / "kit"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = folder
        self._port = port
        made = create_kit(self.kit, federation="faults", hosts=["localhost"], port=port)
        made.add_site("oslo")
        made.add_operator("ann")

    def start_coordinator(self) -> None:
        config = self.kit / "coordinator/coordinator.yaml"
        listen = f"127.0.0.1:{self._port}"
        self._start("coordinator", [FEDLOOM, "coordinator", "--config", config, "--listen", listen])

    def start_site(self, port: int) -> None:
        """Start the daemon; ``port`` is the proxy's."""
        path = self.kit / "sites/oslo/site.yaml"
        path.write_text(
            yaml.safe_dump(yaml.safe_load(path.read_text()) | {"coordinator": f"localhost:{port}"})
        )
        self._start("site", [sys.executable, HERE / "nullsite.py", path])

    def _start(self, name: str, command: Sequence[str | Path]) -> None:
        with (self._logs / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=ENVIRONMENT
            )

    def kill(self, name: str) -> None:
        """End a process as the kernel does when memory runs out."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for name in list(self.running):
            self.kill(name)

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text()

    async def submit(self, model_config: dict[str, object]) -> str:
        """Submit a run of one round as soon as the coordinator answers; gives its id."""
        spec = {
            "name": "faults",
            "model": {"config": model_config, "tokenizer": "bytes"},
            "data": "texts",
            "rounds": 1,
            "local": {"steps": 1, "batch_examples": 1},
            "evaluation": {"every_rounds": 0, "initial": False},
        }
        path, config = self._logs / "run.yaml", self.kit / "operators/ann/operator.yaml"
        path.write_text(json.dumps(spec))
        await self._answered()
        process = await asyncio.create_subprocess_exec(
            FEDLOOM, "run", "submit", "--quiet", path, "--config", config,
            stdout=subprocess.PIPE, env=ENVIRONMENT,
        )  # fmt: skip
        told, _ = await process.communicate()
        assert process.returncode == 0, self.log("coordinator")
        return told.decode().strip()

    async def until(self, holds: Callable[[], bool], seconds: float = START_S) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not holds():  # noqa: ASYNC110 (any condition at all)
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(
                "\n".join(self.log(name)[-3000:] for name in ("coordinator", "site"))
            ) from None

    async def finished(self, run: str, seconds: float) -> GetResponse:
        """The run, as soon as it has finished."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._operator() as coordinator:
                while True:
                    with contextlib.suppress(Unreachable):
                        answer: GetResponse = await coordinator.call(
                            coordinator.runs.Get, GetRequest(run_id=run)
                        )
                        if answer.run.state == RUN_STATE_FINISHED:
                            return answer
                    await asyncio.sleep(POLL_S)
        raise AssertionError("\n".join(self.log(name)[-3000:] for name in ("coordinator", "site")))

    def model(self, digest: str) -> dict[str, NDArray[np.float32]]:
        found: dict[str, NDArray[np.float32]] = load_file(
            self.kit / "coordinator/state/files" / digest.replace(":", "-")
        )
        return found

    def _operator(self) -> "AbstractAsyncContextManager[Coordinator]":
        return Operator(config=self.kit / "operators/ann/operator.yaml").connect()

    async def _answered(self) -> None:
        async with asyncio.timeout(START_S):
            while True:
                with contextlib.suppress(Unreachable):
                    async with self._operator() as coordinator:
                        await coordinator.call(coordinator.runs.List, ListRequest())
                        return
                await asyncio.sleep(POLL_S)


@asynccontextmanager
async def federation_through(folder: Path) -> AsyncIterator[tuple[Federation, Proxy]]:
    """A running coordinator and a running site, and the proxy between them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    federation = Federation(folder, port)
    try:
        federation.start_coordinator()
        async with Proxy(port) as proxy:
            federation.start_site(proxy.port)
            yield federation, proxy
    finally:
        federation.stop()
