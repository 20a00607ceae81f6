"""Following a run: the stream of events, opened again when it breaks, shown live, as lines or as JSON."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live

from fedloom.v1.runs_pb2 import Run, RunState, WatchEvent, WatchRequest
from fedloom_common.errors import AttemptFailed, Unreachable
from fedloom_server.console.board import ENDED, Board
from fedloom_server.console.connection import Coordinator
from fedloom_server.console.formats import as_data, first_line, json_text

RETRY_S = (0.5, 10.0)  # first and longest pause before a broken stream is opened again
REFRESH_S = 0.125  # of the live display
EXIT_STATUS = {
    RunState.RUN_STATE_FINISHED: 0,
    RunState.RUN_STATE_FAILED: 1,
    RunState.RUN_STATE_STOPPED: 3,
    RunState.RUN_STATE_WAITING: 4,
    RunState.RUN_STATE_PAUSED: 5,
}
HELD_UP = (RunState.RUN_STATE_WAITING, RunState.RUN_STATE_PAUSED)


@dataclass(frozen=True)
class Lost:
    """The stream broke and is being opened again."""

    reason: str


async def events(
    coordinator: Coordinator, run_id: str, *, give_up_s: float, until: Collection[int] = ENDED
) -> AsyncGenerator[WatchEvent | Lost, None]:
    """A run's events until its state is one of ``until``, over as many connections as that takes.

    Raises:
        Unreachable: nobody answers the first call, or nobody has for ``give_up_s``.
        FederationError: the coordinator will not show the run.
    """
    lost_at: float | None = None  # on the monotonic clock; None before the first event
    pause_s, state = RETRY_S[0], RunState.RUN_STATE_UNSPECIFIED
    while True:
        heard, reason = False, "the coordinator closed the stream"
        try:
            with coordinator.errors():
                async for event in coordinator.runs.Watch(WatchRequest(run_id=run_id)):
                    heard = True
                    state = event.run.state if event.HasField("run") else state
                    yield event
                    if state in until and state not in ENDED:
                        return  # the stream goes on
        except AttemptFailed as error:
            if lost_at is None and not heard:
                raise
            reason = str(error)
        if state in until:
            return
        if heard or lost_at is None:
            lost_at, pause_s = time.monotonic(), RETRY_S[0]
        elif time.monotonic() - lost_at > give_up_s:
            raise Unreachable(f"no sign of run {run_id} for {give_up_s:g} s: {reason}")
        yield Lost(reason)
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 (jitter, not a secret)
        pause_s = min(pause_s * 2, RETRY_S[1])


async def watch(
    coordinator: Coordinator,
    run_id: str,
    console: Console,
    *,
    give_up_s: float,
    as_json: bool = False,
    until: Collection[int] = ENDED,
) -> Run:
    """Show a run until it has ended: live on a terminal, else a line for each change; returns it as it ended.

    Raises:
        FederationError: see ``events``.
    """
    board, told = Board(), _Told()
    live = console.is_terminal and not as_json
    async with (
        aclosing(events(coordinator, run_id, give_up_s=give_up_s, until=until)) as stream,
        _display(board, console) if live else nullcontext(),
    ):
        async for event in stream:
            lines = _take(board, event)
            if as_json and isinstance(event, WatchEvent) and told.is_new(event):
                console.out(json_text(as_data(event), indent=None))
            elif not live and not as_json:
                for line in lines:
                    console.print(line, soft_wrap=True)
    return board.run


class _Told:
    """What was told as JSON: after a break the coordinator says again how everything stands."""

    def __init__(self) -> None:
        self._latest: dict[tuple[str, int], WatchEvent] = {}

    def is_new(self, event: WatchEvent) -> bool:
        """Whether the run or round was not told just so; progress always is."""
        if event.HasField("site_progress"):
            return True
        kind = event.WhichOneof("kind") or ""
        key = (kind, event.round.number)
        before, self._latest[key] = self._latest.get(key), event
        return event != before


def _take(board: Board, event: WatchEvent | Lost) -> list[str]:
    if isinstance(event, Lost):
        known, board.lost = board.lost, event.reason
        return [] if known else [f"reconnecting: {first_line(event.reason)}"]
    lines = ["connected again"] if board.lost else []
    board.lost = ""
    return [*lines, *board.fold(event)]


@asynccontextmanager
async def _display(board: Board, console: Console) -> AsyncIterator[None]:
    """The board, drawn again and again; what stays at the end is the whole of it."""
    with Live(console=console, auto_refresh=False, transient=False) as live:
        drawing = asyncio.create_task(_draw(board, live))
        try:
            yield
        finally:
            drawing.cancel()
            with suppress(asyncio.CancelledError):
                await drawing
            live.update(board.render(), refresh=True)


async def _draw(board: Board, live: Live) -> None:
    while True:
        live.update(board.render(height=live.console.size.height), refresh=True)
        await asyncio.sleep(REFRESH_S)
