"""The processes of a measurement: started in order, and gone when it ends, however it ends."""

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

STOP_S = 15.0
LOG_TOLD_CHARACTERS = 3000
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

_OWN_LOOPBACK = "FEDLOOM_BENCHMARK_LOOPBACK"
_PR_SET_PDEATHSIG = 1
_SIOCSIFFLAGS = 0x8914
_UP_LOOPBACK_RUNNING = 0x49
_libc = ctypes.CDLL(None)


class Processes:
    """Named processes, each with a log file; the end of the block ends them, and so does this one's death."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        talks: bool = False,
        cwd: Path | None = None,
    ) -> "subprocess.Popen[bytes]":
        """Start a process in a session of its own; one that ``talks`` has pipes for its input and output.

        Must be called from the main thread: the kernel ends the process with the thread that started it.
        """
        pipe = subprocess.PIPE if talks else None
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or log,
                stderr=log,
                env=ENVIRONMENT | dict(environment or {}),
                cwd=cwd,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._running[name] = process
        return process

    def pids(self, prefix: str = "") -> dict[str, int]:
        """Process ids by name."""
        return {name: process.pid for name, process in self._running.items() if name.startswith(prefix)}

    def require_alive(self) -> None:
        """Check that none has ended.

        Raises:
            SystemExit: with the end of the log of the first that has.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                raise SystemExit(
                    f"{name} ended with status {process.returncode}; its last lines:\n{self.told(name)}"
                )

    def ended(self, name: str) -> bool:
        """Whether a process has ended, well or not."""
        return self._running[name].poll() is not None

    def told(self, name: str) -> str:
        """The end of a process's log."""
        return self._log(name).read_text(errors="replace")[-LOG_TOLD_CHARACTERS:]

    def stop(self) -> None:
        """End every process, the last started first, and whatever each of them has started."""
        for process in reversed(self._running.values()):
            process.terminate()
        deadline_at_s = time.monotonic() + STOP_S
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline_at_s - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._running.clear()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port that is free on loopback now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for_port(port: int, processes: Processes, timeout_s: float = 120.0) -> None:
    """Return as soon as somebody listens.

    Raises:
        SystemExit: a process ended first, or the time is over.
    """
    deadline_at_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_at_s:
        processes.require_alive()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nobody listens on port {port} after {timeout_s:g} s")


def take_own_loopback() -> bool:
    """Begin this program again with a loopback device of its own, whose counter counts nothing else.

    Gives whether that is so: where the system lets nobody have a network namespace the program goes on
    with the machine's loopback device.
    """
    if os.environ.get(_OWN_LOOPBACK):
        with socket.socket() as any_socket:
            request: Any = struct.pack("16sH22x", b"lo", _UP_LOOPBACK_RUNNING)
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
        return True
    enter = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*enter, "true"], check=False).returncode:
        return False
    os.environ[_OWN_LOOPBACK] = "1"
    return os.execvp("unshare", [*enter, sys.executable, *sys.argv])
