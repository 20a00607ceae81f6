"""One life of the launcher process, and the daemon's end of rank 0's socket."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedloom_client.config import Workers
from fedloom_client.training.controls import FOLDER as CONTROL_FOLDER
from fedloom_client.training.launcher import SHUTDOWN_TIMEOUT_S, Launch, last_lines
from fedloom_client.training.orders import LINE_LIMIT_BYTES, Job, WorkerProgress, decode, encode
from fedloom_common.errors import TrainingFailed
from fedloom_common.files import clear_partials

SOCKET_PATH_BYTES = 100  # sun_path holds 108 with the final zero
FAILURE = "failure.txt"
FOLDER_PREFIX = "fedloom-"
FOLDER_NOTE = "socket-folder"  # says where it is, so that the next daemon can clear it away
LAUNCHER_LOG = "launcher.log"
STOP_S = 5.0  # for warm ranks to leave by themselves
LOG_FOLDERS_KEPT = 5


class RankZero:
    """A rank 0 that has said ready."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._lost = False
        self.has_served = False
        """Whether it has done an order."""

    @property
    def is_lost(self) -> bool:
        """Whether the process has ended, as far as its socket tells."""
        # a process that was killed may leave a reset connection instead of an end of file
        return self._lost or self._reader.at_eof() or self._reader.exception() is not None

    async def ask(self, job: Job, on_progress: Callable[[WorkerProgress], None]) -> tuple[str, Any] | None:
        """Have a job done; what the rank says at the end, None if it died."""
        return await self._talk(encode("job", job.to_json()), on_progress)

    async def call_off(self, order_id: str) -> bool:
        """Have the order under way stopped; whether the rank is then ready for others."""
        return await self._talk(encode("cancel", order_id), lambda _: None) is not None

    def say_stop(self) -> None:
        """Have the ranks end after what they do now."""
        with contextlib.suppress(ConnectionError):
            self._writer.write(encode("stop"))

    async def close(self) -> None:
        """Let go of the socket."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _talk(
        self, line: bytes, on_progress: Callable[[WorkerProgress], None]
    ) -> tuple[str, Any] | None:
        with contextlib.suppress(ConnectionError):
            self._writer.write(line)
            await self._writer.drain()
            while answer := await self._reader.readline():
                kind, body = decode(answer)
                if kind != "progress":
                    return kind, body
                on_progress(WorkerProgress(**body))
        self._lost = True
        return None


class Launched:
    """A running launcher, and the socket that its rank 0 comes to."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self._folder, self._logs = folder, logs
        self._arrivals: asyncio.Queue[RankZero] = asyncio.Queue()
        self._arrived: list[RankZero] = []
        self._rank: RankZero | None = None
        self._server: asyncio.Server | None = None

    @classmethod
    async def start(cls, workers: Workers, directory: Path, max_restarts: int) -> "Launched":
        """Start the launcher, which starts the ranks.

        Raises:
            TrainingFailed: the workers' settings do not go together.
        """
        logs = directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        trim_logs(logs)
        clear_after_kill(directory)
        launched = cls(_short_folder(), logs)
        try:
            (directory / FOLDER_NOTE).write_text(str(launched._folder))
            await launched._start(workers, directory, max_restarts)
        except BaseException:
            await launched._clean()
            raise
        return launched

    @property
    def has_served(self) -> bool:
        """Whether the group has done an order."""
        return any(rank.has_served for rank in self._arrived)

    async def rank_zero(self) -> RankZero | None:
        """Rank 0 when it is ready; None if the launcher ends first, its restarts used up."""
        while self._rank is None or self._rank.is_lost:
            arrival = asyncio.create_task(self._arrivals.get())
            try:
                await asyncio.wait({arrival, self._exit}, return_when=asyncio.FIRST_COMPLETED)
                if not arrival.done():
                    return None
            finally:  # a cancel must not lose a rank that has been taken off the queue
                if not arrival.cancel():
                    self._rank = arrival.result()
        return self._rank

    @property
    def was_killed(self) -> bool:
        """Whether the launcher has ended by a signal, which is nothing that it could tell of."""
        return self._exit.done() and self._exit.result() < 0

    def reason(self) -> str:
        """Why the launcher ended."""
        where = f"(output of the ranks: {self._logs})"
        failure = self._logs / FAILURE
        if failure.is_file():
            return f"{failure.read_text()}\n{where}"
        log = last_lines((self._logs / LAUNCHER_LOG).read_text(errors="replace"))
        return f"the launcher ended with status {self._exit.result()}\n{log}\n{where}"

    async def stop(self) -> None:
        """End the launcher and its ranks: politely if they wait for work, else by signals."""
        try:
            if self._rank is not None and not self._rank.is_lost:
                self._rank.say_stop()
                await asyncio.wait({self._exit}, timeout=STOP_S)
            await end_launcher(self._process, self._exit)
        finally:
            if not self._exit.done():
                self._process.kill()  # the kernel then kills the ranks
            await self._clean()

    async def _start(self, workers: Workers, directory: Path, max_restarts: int) -> None:
        socket = self._folder / "socket"
        launch = launch_of(workers, self._logs, socket=socket, max_restarts=max_restarts)
        (self._logs / FAILURE).unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._arrive, socket, limit=LINE_LIMIT_BYTES)
        self._process = await start_launcher(launch, directory)
        self._exit = asyncio.create_task(self._process.wait())

    async def _clean(self) -> None:
        if self._server is not None:
            self._server.close()
        for rank in self._arrived:
            await rank.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._logs.parent / FOLDER_NOTE).unlink(missing_ok=True)

    async def _arrive(self, reader: StreamReader, writer: StreamWriter) -> None:
        line = await reader.readline()
        if line and decode(line)[0] == "ready":
            with contextlib.suppress(OSError):  # what cannot be removed costs room, not the work
                await asyncio.to_thread(_clear_half_written, self._logs.parent)
            rank = RankZero(reader, writer)
            self._arrived.append(rank)
            self._arrivals.put_nowait(rank)
        else:
            writer.close()


def launch_of(workers: Workers, logs: Path, *, socket: Path | None, max_restarts: int) -> Launch:
    """What to tell a launcher; without ``socket`` it joins the daemon's on another host.

    Raises:
        TrainingFailed: the workers' settings do not go together.
    """
    if workers.nnodes > 1 and workers.rdzv_endpoint is None:
        raise TrainingFailed(
            f"workers.nnodes is {workers.nnodes}, but workers.rdzv_endpoint is not set: give host:port of "
            "the daemon's host, the same on every host of the site"
        )
    if workers.nnodes == 1 and socket is None:
        raise TrainingFailed("workers.nnodes is 1: the group has no further hosts to join it from")
    endpoint = workers.rdzv_endpoint if workers.nnodes > 1 else f"{socket}.rendezvous"
    assert endpoint is not None
    return Launch(
        parent_pid=os.getpid(),
        nproc_per_node=workers.nproc_per_node,
        device=workers.device,
        threads_per_rank=workers.threads_per_rank,
        max_restarts=max_restarts,
        collective_timeout_s=workers.collective_timeout_s,
        nnodes=workers.nnodes,
        rdzv_endpoint=endpoint,
        rdzv_id=workers.rdzv_id,
        socket=None if socket is None else str(socket),
        logs=str(logs),
        failure=str(logs / FAILURE),
    )


async def start_launcher(launch: Launch, directory: Path) -> Process:
    """Run a launcher: nothing comes from the hub, caches stay in ``directory``, its output is in the logs."""
    command = [sys.executable, "-m", "fedloom_client.training.launcher", launch.to_json()]
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str((directory / "huggingface").absolute())}
    with (Path(launch.logs) / LAUNCHER_LOG).open("wb") as log:
        return await asyncio.create_subprocess_exec(
            *command, env=os.environ | settings, stdin=DEVNULL, stdout=log, stderr=log,
            start_new_session=True,  # a Ctrl-C in the terminal is for this process to handle
        )  # fmt: skip


async def end_launcher(launcher: Process, ended: "asyncio.Task[int]") -> None:
    """Have a launcher end its ranks and itself, if it has not ended."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):  # it ends just now
                launcher.send_signal(sign)
            await asyncio.wait({ended}, timeout=2 * SHUTDOWN_TIMEOUT_S)


def trim_logs(logs: Path) -> None:
    """Keep the ranks' logs of the last few launches."""
    folders = sorted(
        (path for path in logs.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns
    )
    for old in folders[:-LOG_FOLDERS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def clear_after_kill(directory: Path) -> None:
    """Remove what a launch in ``directory`` left whose daemon was killed, as its ranks were."""
    _clear_half_written(directory)
    note = directory / FOLDER_NOTE
    if note.is_file():
        folder = Path(note.read_text())
        if folder.name.startswith(FOLDER_PREFIX):
            shutil.rmtree(folder, ignore_errors=True)
        note.unlink()


def _clear_half_written(directory: Path) -> None:
    """Remove what ranks were writing in the run's folder when they were killed; only rank 0 writes there."""
    for folder in (directory, directory / CONTROL_FOLDER):
        clear_partials(folder)


def _short_folder() -> Path:
    """A folder for the socket that only this user can enter, with a path short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    if len(os.fsencode(folder / "socket")) <= SOCKET_PATH_BYTES:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))
