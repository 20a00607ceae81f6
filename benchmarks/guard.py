"""Ends a measurement before it takes the machine's memory."""

import ctypes
import os
import threading
from types import TracebackType

import psutil
from machine import available_bytes
from measure import GB

LOOK_S = 0.1
LOOKS_A_COUNT = 5  # counting every process's memory reads all of /proc
RESERVE_BYTES = 2 * GB
"""Left to everybody else, unless a limit is given."""
FLOOR_BYTES = GB
"""Left on the machine, whoever takes it."""

_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)


class MemoryGuard:
    """While the block runs, watches all processes that this one has started, and theirs.

    Kills them all as soon as they hold more than the limit or the machine runs short; ``reason`` then says
    so. The end of the block kills what is left, also what has moved to a session of its own.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        """Without a limit: what is free now, less a reserve."""
        free_bytes = available_bytes()
        self.limit_bytes = free_bytes - RESERVE_BYTES if limit_bytes is None else limit_bytes
        self.floor_bytes = min(FLOOR_BYTES, free_bytes // 2)
        self.reason: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryGuard":
        # Whoever loses his parent becomes this process's child, and so stays in sight.
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        psutil.wait_procs(_kill_descendants())
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)

    def _watch(self) -> None:
        looks = 0
        while self.reason is None and not self._stopped.wait(LOOK_S):
            free_bytes = available_bytes()
            if free_bytes < self.floor_bytes:
                self._end(f"stopped: the machine had {free_bytes / GB:.1f} GB of memory left")
            elif looks % LOOKS_A_COUNT == 0:
                held_bytes = _held_bytes()
                if held_bytes > self.limit_bytes:
                    self._end(
                        f"stopped: its processes took {held_bytes / GB:.1f} GB of memory, the limit is "
                        f"{self.limit_bytes / GB:.1f} GB (--memory)"
                    )
            looks += 1

    def _end(self, reason: str) -> None:
        self.reason = reason
        _kill_descendants()


def _held_bytes() -> int:
    held_bytes = 0
    for process in psutil.Process().children(recursive=True):
        try:
            held_bytes += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return held_bytes


def _kill_descendants() -> list[psutil.Process]:
    """Kill all, and those that they start meanwhile."""
    killed: dict[int, psutil.Process] = {}
    while grown := [p for p in psutil.Process(os.getpid()).children(recursive=True) if p.pid not in killed]:
        for process in grown:
            killed[process.pid] = process
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
    return list(killed.values())
