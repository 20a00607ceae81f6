"""The daemon's end of rank 0's socket, with a plain socket in the rank's place."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from fedloom_client import launches
from fedloom_client.config import Workers
from fedloom_client.launches import FOLDER_NOTE, Launched, RankZero, clear_after_kill
from fedloom_client.training.launcher import Launch
from fedloom_client.training.orders import Job, Order, Source, WorkerResult, encode
from fedloom_common.errors import TrainingFailed

ORDER = Order(id="a", work="evaluate", run_id="r", round=0, model_path="", assets_dir="", spec={})
JOB = Job(
    order=ORDER,
    source=Source(format="text", files=(), fields={}, held_out=0.1),
    directory="",
    packed="",
)


class NoLauncher:
    """The process of a launcher that starts no ranks."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def wait(self) -> int:
        await self.ended.wait()
        return 0

    def send_signal(self, sign: int) -> None:
        self.ended.set()


@pytest.fixture
def controls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The daemon's socket of each launch, whose ranks a test stands in for."""
    sockets: list[str] = []

    async def start(launch: Launch, directory: Path) -> Any:
        sockets.append(str(launch.socket))
        return NoLauncher()

    monkeypatch.setattr(launches, "start_launcher", start)
    monkeypatch.setattr(launches, "STOP_S", 0)
    return sockets


@pytest.mark.parametrize("unread", [False, True], ids=["end-of-file", "reset"])
async def test_a_dead_rank_is_known_to_be_lost_however_its_connection_ended(
    tmp_path: Path, unread: bool
) -> None:
    met: asyncio.Queue[RankZero] = asyncio.Queue()
    server = await asyncio.start_unix_server(
        lambda reader, writer: met.put_nowait(RankZero(reader, writer)), tmp_path / "socket"
    )
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "socket"))
        rank = await met.get()
        assert not rank.is_lost
        if unread:  # a socket that is closed with something to read resets the connection
            rank.say_stop()
    async with asyncio.timeout(60):
        assert await rank.ask(JOB, lambda _: None) is None
    assert rank.is_lost
    await rank.close()
    server.close()


def test_the_socket_of_a_killed_daemon_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    for name in ("fedloom-abc", "home"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "socket").touch()
        (tmp_path / FOLDER_NOTE).write_text(str(tmp_path / name))
        clear_after_kill(tmp_path)
        clear_after_kill(tmp_path)  # there is nothing left to clear
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


async def test_what_a_killed_rank_was_writing_is_gone_when_the_next_is_ready(
    tmp_path: Path, controls: list[str]
) -> None:
    """The daemon writes the residual, and downloads folds: both may go on meanwhile."""
    names = (".optimizer-3.safetensors.7.partial", "control/.pending.safetensors.7.partial")
    others = ("optimizer-2.safetensors", "residual/.pending.safetensors.7.partial", "folds/.a.partial")
    launched = await Launched.start(Workers(device="cpu"), tmp_path, 0)
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with socket.socket(socket.AF_UNIX) as rank:
        rank.connect(controls[0])
        rank.sendall(encode("ready"))
        async with asyncio.timeout(60):
            assert await launched.rank_zero() is not None
    assert not any((tmp_path / name).exists() for name in names)
    assert all((tmp_path / name).exists() for name in others)
    await launched.stop()


async def test_a_rank_that_comes_with_a_cancel_is_there_for_the_next_order(
    tmp_path: Path, controls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait_and_be_cancelled(*arguments: Any, **named: Any) -> Any:
        await wait(*arguments, **named)
        raise asyncio.CancelledError

    wait = asyncio.wait
    launched = await Launched.start(Workers(device="cpu"), tmp_path, 0)
    with socket.socket(socket.AF_UNIX) as rank:
        rank.connect(controls[0])
        rank.sendall(encode("ready"))
        with monkeypatch.context() as patch, pytest.raises(asyncio.CancelledError):
            patch.setattr(asyncio, "wait", wait_and_be_cancelled)
            await launched.rank_zero()
        async with asyncio.timeout(5):
            assert await launched.rank_zero() is not None
    await launched.stop()


@pytest.mark.parametrize(
    "told",
    [
        {"weights": {"f1": 3.0}},
        {"counts": {"hits": [3.0]}},
        {"counts": {"hits": [-1]}},
        {"weights": {"f1": 1 << 63}},
        {"metrics": {"f1": "high"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["result", "before"])
def test_numbers_of_a_plug_in_that_cannot_be_sent_are_a_failed_training(told, where):
    good = {"examples": 1, "tokens": 1, "metrics": {"loss": 1.0}, "weights": {}, "counts": {}}
    body = good | told if where == "result" else good | {"before": good | told}
    with pytest.raises(TrainingFailed, match="the task's"):
        WorkerResult.of(body)
    assert WorkerResult.of(good | {"before": good}).before == WorkerResult.of(good)
