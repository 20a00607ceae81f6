"""The daemon as a process: one a state folder, light, quick to stop, and nothing finished lost."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedloom_client.daemon import Daemon
from fedloom_common.errors import BadSpec, NotPermitted, WrongState

FEDLOOM = [sys.executable, "-c", "from fedloom_common.cli import main; main()", "client"]

TRAINER = """
import asyncio, contextlib, json, logging, sys
from pathlib import Path
from fedloom_client import daemon
from fedloom_client.config import SiteConfig
from fedloom_client.daemon import Daemon
from fedloom_client.training.orders import WorkerResult

class Trainer:
    async def perform(self, order, on_progress):
        Path(sys.argv[2]).open("a").write(order.id + "\\n")
        if "sleep" in sys.argv:
            await asyncio.sleep(600)
        if "deaf" in sys.argv:  # as ranks are while they load a model
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(600)
            await asyncio.sleep(600)
        Path(order.update_path).write_bytes(b"trained" * 1000)
        return WorkerResult(examples=1, tokens=2, metrics={}, phase_seconds={})

    async def stop(self):
        pass

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
daemon.STOP_S = 1.0
config = SiteConfig.model_validate(json.loads(Path(sys.argv[1]).read_text()))
asyncio.run(Daemon(config, make_group=lambda data, folder: Trainer()).run())
"""


class Process:
    """A daemon in its own process, with a trainer that notes each training in a file."""

    def __init__(self, world: Any, *arguments: str) -> None:
        self._site = world.folder / "site.json"
        self._site.write_text(world.config().model_dump_json())
        self.trained = world.folder / "trained.log"
        self._arguments = arguments

    async def start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", TRAINER, str(self._site), str(self.trained), *self._arguments),
            stderr=asyncio.subprocess.PIPE,
        )


async def test_a_finished_training_survives_kill_9_and_is_sent_without_training_again(world: Any) -> None:
    world.coordinator.grants = False
    process = Process(world)
    first = await process.start()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until_heard("outcome")
    first.kill()
    await first.wait()
    world.coordinator.grants = True
    second = await process.start()
    assert list((await world.attached(2)).open_assignments) == ["r1-train"]
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1-train"])
    assert bytes(world.coordinator.spool["r1-train"]) == b"trained" * 1000
    assert process.trained.read_text() == "r1-train\n"
    second.terminate()
    assert await second.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "sigint"])
async def test_a_signal_stops_the_work_under_way_and_exits_with_0(world: Any, number: int) -> None:
    process = Process(world, "sleep")
    running = await process.start()
    await world.attached()
    world.coordinator.assign(world.assignment())
    await world.coordinator.until_heard("progress")
    while not process.trained.exists():  # noqa: ASYNC110 (another process makes it)
        await asyncio.sleep(0.02)
    running.send_signal(number)
    async with asyncio.timeout(60):
        assert await running.wait() == 0
    assert list((world.state / "outbox").iterdir()) == []


async def test_work_that_does_not_hear_of_the_stop_is_cut_off_and_that_is_no_error(world: Any) -> None:
    process = Process(world, "deaf")
    running = await process.start()
    await world.attached()
    world.coordinator.assign(world.assignment())
    while not process.trained.exists():  # noqa: ASYNC110 (another process makes it)
        await asyncio.sleep(0.02)
    running.terminate()
    async with asyncio.timeout(60):
        _, told = await running.communicate()
    lines = told.decode().splitlines()
    assert running.returncode == 0
    assert lines[-1] == "INFO the work under way outlasts the stop and is cut off"
    assert not [line for line in lines if line.startswith(("ERROR", "Traceback"))]


async def test_two_daemons_cannot_share_a_state_folder(world: Any) -> None:
    world.daemon()
    await world.attached()
    with pytest.raises(WrongState, match=rf"process {os.getpid()}\) uses state_dir .*state; stop it"):
        await Daemon(world.config(), make_group=world.group.make).run()


async def test_a_state_folder_that_cannot_be_made_is_named(world: Any) -> None:
    (world.folder / "file").write_text("")
    with pytest.raises(BadSpec, match="file/state cannot be used"):
        await Daemon(world.config(state_dir=world.folder / "file" / "state")).run()


async def test_certificates_that_are_not_there_end_the_start(world: Any) -> None:
    files = {name: world.folder / name for name in ("ca", "certificate", "key")}
    with pytest.raises(BadSpec, match="cannot be read"):
        await Daemon(world.config(insecure=None, tls=files)).run()


async def test_no_tls_is_for_loopback_only(world: Any) -> None:
    with pytest.raises(NotPermitted, match=r"not coordinator\.example\.org:7443"):
        await Daemon(world.config(coordinator="coordinator.example.org:7443")).run()


def test_the_daemon_starts_without_the_training_libraries() -> None:
    code = (
        "import sys, fedloom_client.daemon\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def write_site(folder: Path, port: int) -> Path:
    site = folder / "site.yaml"
    facts = {
        "coordinator": f"127.0.0.1:{port}",
        "insecure": "oslo",
        "state_dir": "state",
        "data": {"plays": {"files": ["*.txt"]}},
    }
    site.write_text(json.dumps(facts))
    return site


async def fedloom(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *FEDLOOM, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_the_command_attaches_and_health_says_whether_it_is_attached(world: Any) -> None:
    world.coordinator.heartbeat_s = 60.0
    site = write_site(world.folder, world.coordinator.port)
    assert await fedloom("health", "--config", str(site)) == (
        1,
        f"no client daemon has run with this state_dir: {world.state / 'status.json'} is missing\n",
    )
    running = await asyncio.create_subprocess_exec(*FEDLOOM, "--config", str(site), "--log_level", "ERROR")
    await world.coordinator.until_heard("heartbeat")
    assert await fedloom("health", "--config", str(site)) == (0, "attached\n")
    running.kill()
    await running.wait()
    status, output = await fedloom("health", "--config", str(site))
    assert (status, output) == (1, f"the client daemon (process {running.pid}) is gone\n")


async def test_one_of_tls_and_insecure_is_required(world: Any) -> None:
    site = write_site(world.folder, 7443)
    status, output = await fedloom("--config", str(site), "--insecure", "null")
    assert status == 2
    assert "give tls: the folder that `fedloom provision site` made" in output


async def test_a_mistake_in_a_flag_is_named(world: Any) -> None:
    site = write_site(world.folder, 7443)
    status, output = await fedloom("--config", str(site), "--policy.max_step_per_round", "3")
    assert status == 2
    assert "did you mean max_steps_per_round?" in output
