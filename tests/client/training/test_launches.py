"""The daemon's end of rank 0's socket, with a plain socket in the rank's place."""

import asyncio
import socket
from pathlib import Path

import pytest

from fedloom_client.launches import FOLDER_NOTE, RankZero, clear_after_kill
from fedloom_client.training.orders import Job, Order, Source

ORDER = Order(id="a", work="evaluate", run_id="r", round=0, model_path="", assets_dir="", spec={})
JOB = Job(
    order=ORDER,
    source=Source(format="text", files=(), fields={}, held_out=0.1),
    directory="",
    packed="",
)


@pytest.mark.parametrize("unread", [False, True], ids=["end-of-file", "reset"])
async def test_a_dead_rank_is_known_to_be_lost_however_its_connection_ended(
    tmp_path: Path, unread: bool
) -> None:
    met: asyncio.Queue[RankZero] = asyncio.Queue()
    server = await asyncio.start_unix_server(
        lambda reader, writer: met.put_nowait(RankZero(reader, writer)), tmp_path / "control"
    )
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "control"))
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
        (tmp_path / name / "control").touch()
        (tmp_path / FOLDER_NOTE).write_text(str(tmp_path / name))
        clear_after_kill(tmp_path)
        clear_after_kill(tmp_path)  # there is nothing left to clear
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
