"""Whether a process is well: how late its event loop runs, and what keeps it from being ready."""

import asyncio
import shutil
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NoReturn

BEAT_S = 0.5
WINDOW_BEATS = 60  # a scrape every half minute sees the worst of what came since the last one
HANGS_S = 30.0  # only an operation that blocks the loop takes so long, and no request is served meanwhile
CHECK_S = 5.0

Check = Callable[[], Awaitable[str | None]]
"""Says what is wrong; None if nothing is."""


class LoopLag:
    """How late the event loop wakes a task that has slept."""

    def __init__(self) -> None:
        self._late_s: deque[float] = deque([0.0], maxlen=WINDOW_BEATS)

    async def watch(self) -> NoReturn:
        """Measure, until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            due_s = clock() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self._late_s.append(max(0.0, clock() - due_s))

    @property
    def latest_s(self) -> float:
        """Of the latest beat."""
        return self._late_s[-1]

    @property
    def worst_s(self) -> float:
        """Of the last half minute."""
        return max(self._late_s)


async def troubles(checks: Mapping[str, Check]) -> dict[str, str]:
    """What is wrong now, by the check that found it; a check that does not answer is wrong too."""
    found = await asyncio.gather(*(_trouble(check) for check in checks.values()))
    return {name: trouble for name, trouble in zip(checks, found, strict=True) if trouble is not None}


async def _trouble(check: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_S):
            return await check()
    except TimeoutError:
        return f"no answer in {CHECK_S:g} s"


def seldom(check: Check, every_s: float) -> Check:
    """A check that is made once in ``every_s`` at most, never twice at a time, however often asked for."""
    latest: asyncio.Task[str | None] | None = None
    began_s = 0.0

    async def answer() -> str | None:
        nonlocal latest, began_s
        now_s = asyncio.get_running_loop().time()
        if latest is None or (latest.done() and now_s - began_s >= every_s):
            latest, began_s = asyncio.ensure_future(check()), now_s
        return await asyncio.shield(latest)

    return answer


def disk_above(folder: Path, floor_bytes: int) -> Check:
    """A check that so much is free on a folder's disk."""

    async def check() -> str | None:
        free_bytes = (await asyncio.to_thread(shutil.disk_usage, folder)).free
        if free_bytes >= floor_bytes:
            return None
        return f"{free_bytes} bytes are free in {folder}, the floor is {floor_bytes}: free some, or move it"

    return check
