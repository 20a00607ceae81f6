import asyncio
import io
import json
import signal
import sys
from contextlib import asynccontextmanager

import grpc
import pytest
from rich.console import Console

from fedloom.v1 import runs_pb2 as pb
from fedloom.v1.session_pb2 import WORK_TRAIN
from fedloom_common.errors import NotFound, NotPermitted, Unreachable
from fedloom_server.console import watch
from fedloom_server.console.connection import Operator
from fedloom_server.console.watch import Lost, events


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(watch, "RETRY_S", (0.01, 0.02))


@asynccontextmanager
async def connected(fake):
    operator = Operator(config=None, flags=("--coordinator", fake.address, "--insecure", "alice"))
    async with operator.connect() as coordinator:
        yield coordinator


def run_event(state=pb.RUN_STATE_RUNNING, reason=""):
    return pb.WatchEvent(run=pb.Run(id="a1b2c3", name="plays", state=state, reason=reason, rounds_total=2))


def round_event(number, state, *sites):
    return pb.WatchEvent(round=pb.Round(number=number, state=state, sites=sites))


RUNNING = run_event()
FINISHED = run_event(pb.RUN_STATE_FINISHED, "all 2 rounds are done")
TRAINING = round_event(1, pb.ROUND_STATE_TRAINING)
DONE = round_event(1, pb.ROUND_STATE_FINISHED, pb.SiteRound(site="kiel", work=WORK_TRAIN, state="done"))


async def seen(fake, give_up_s=30.0):
    async with connected(fake) as coordinator:
        return [event async for event in events(coordinator, "a1", give_up_s=give_up_s)]


async def test_a_broken_stream_is_opened_again(fake):
    fake.connections = [[RUNNING, TRAINING, fake.breaks()], [RUNNING, DONE, FINISHED]]
    found = await seen(fake)
    assert [event for event in found if not isinstance(event, Lost)] == [
        RUNNING,
        TRAINING,
        RUNNING,
        DONE,
        FINISHED,
    ]
    (lost,) = (event for event in found if isinstance(event, Lost))
    assert f"no coordinator answers at {fake.address}: reset" in lost.reason


async def test_a_stream_that_ends_before_the_run_is_opened_again(fake):
    fake.connections = [[RUNNING], [RUNNING, FINISHED]]
    found = await seen(fake)
    assert [type(event).__name__ for event in found] == ["WatchEvent", "Lost", "WatchEvent", "WatchEvent"]


async def test_a_stream_that_breaks_after_the_end_is_enough(fake):
    fake.connections = [[RUNNING, FINISHED, fake.breaks()]]
    assert (await seen(fake))[-1] == FINISHED


async def test_all_rounds_of_a_run_that_has_ended_are_told(fake):
    fake.connections = [[FINISHED, round_event(0, pb.ROUND_STATE_FINISHED), DONE]]
    assert await seen(fake) == [FINISHED, round_event(0, pb.ROUND_STATE_FINISHED), DONE]


async def test_a_first_call_that_nobody_answers_is_an_error_at_once(fake):
    with pytest.raises(Unreachable, match="no more connections"):
        await seen(fake)
    assert len(fake.asked) == 1


async def test_a_run_that_is_not_there_is_an_error_and_not_a_retry(fake):
    fake.refusal = NotFound("no run begins with a1")
    with pytest.raises(NotFound, match="no run begins with a1"):
        await seen(fake)
    assert len(fake.asked) == 1


async def test_watching_gives_up_in_the_end(fake):
    fake.connections = [[RUNNING, fake.breaks()]]
    with pytest.raises(Unreachable, match=r"no sign of run a1 for 0\.2 s: .*no more connections"):
        await seen(fake, give_up_s=0.2)
    assert len(fake.asked) > 3


async def test_a_run_that_was_silent_for_long_is_not_given_up_at_its_first_break(fake):
    fake.connections = [[RUNNING, fake.breaks()], [RUNNING, fake.breaks()], [FINISHED]]
    assert (await seen(fake, give_up_s=0.0))[-1] == FINISHED


async def test_a_reconnect_tells_only_what_is_new(fake):
    out = io.StringIO()
    fake.connections = [[RUNNING, TRAINING, fake.breaks()], [RUNNING, TRAINING, DONE, FINISHED]]
    async with connected(fake) as coordinator:
        run = await watch.watch(coordinator, "a1", Console(file=out, width=40), give_up_s=30)
    assert run == FINISHED.run
    assert out.getvalue().splitlines() == [
        "run a1b2c3 is running",
        "round 1 is training",
        f"reconnecting: no coordinator answers at {fake.address}: reset",
        "connected again",
        "round 1  kiel: train done: 0 examples",
        "round 1 is finished",
        "run a1b2c3 is finished: all 2 rounds are done",
    ]


async def test_a_terminal_gets_a_live_board_whose_last_state_stays(fake):
    out = io.StringIO()
    fake.connections = [[RUNNING, TRAINING, fake.breaks()], [DONE, FINISHED]]
    console = Console(file=out, width=100, height=30, force_terminal=True, color_system=None)
    async with connected(fake) as coordinator:
        await watch.watch(coordinator, "a1", console, give_up_s=30)
    last = out.getvalue().rpartition("plays")[2]
    assert "all 2 rounds are done" in last
    assert "reconnecting" not in last
    assert "1/1" in last


def test_json_is_a_line_for_each_event(console, fake):
    long = "x" * 500
    fake.connections = [[RUNNING, fake.breaks()], [DONE, run_event(pb.RUN_STATE_FINISHED, long)]]
    lines = console("run", "watch", "a1", "--json").stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert [next(iter(event)) for event in found] == ["run", "round", "run"]
    assert found[-1]["run"]["reason"] == long


@pytest.mark.parametrize(
    ("state", "status"),
    [(pb.RUN_STATE_FINISHED, 0), (pb.RUN_STATE_FAILED, 1), (pb.RUN_STATE_STOPPED, 3)],
)
def test_the_exit_status_tells_how_the_run_ended(console, fake, state, status):
    fake.connections = [[RUNNING, run_event(state, "so it is")]]
    result = console("run", "watch", "a1", status=status)
    assert result.exit_code == status
    assert result.stdout.splitlines()[-1].endswith(": so it is")


@pytest.mark.parametrize(("state", "status"), [(pb.RUN_STATE_WAITING, 4), (pb.RUN_STATE_PAUSED, 5)])
def test_a_watch_that_is_told_so_ends_when_the_run_is_held_up(console, fake, state, status):
    fake.connections, fake.hang = [[RUNNING, run_event(state, "too few sites")]], True
    result = console("run", "watch", "a1", "--exit-when-waiting", status=status)
    assert result.exit_code == status
    assert result.stdout.splitlines()[-1].endswith(": too few sites")


def test_a_waiting_run_is_watched_on(console, fake):
    fake.connections = [[RUNNING, run_event(pb.RUN_STATE_WAITING), FINISHED]]
    assert console("run", "watch", "a1").stdout.splitlines() == [
        "run a1b2c3 is running",
        "run a1b2c3 is waiting",
        "run a1b2c3 is finished: all 2 rounds are done",
    ]


def test_json_does_not_repeat_what_a_reconnect_tells_again(console, fake):
    fake.connections = [[RUNNING, TRAINING, fake.breaks()], [RUNNING, TRAINING, DONE, FINISHED]]
    lines = console("run", "watch", "a1", "--json").stdout.splitlines()
    assert [next(iter(json.loads(line))) for line in lines] == ["run", "round", "round", "run"]


async def test_ctrl_c_leaves_the_run_going_and_says_so(fake, tmp_path):
    fake.connections, fake.hang = [[RUNNING, TRAINING]], True
    where = ("--coordinator", fake.address, "--insecure", "alice")
    program = "from fedloom_server.console.runs import app; app()"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", program, "watch", "a1b2c3", *where),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"run a1b2c3 is running\n"
    process.send_signal(signal.SIGINT)
    _, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 130
    assert "The run goes on. See it again with: fedloom run watch a1b2c3" in stderr.decode()
    assert "Traceback" not in stderr.decode()
    assert fake.asked_for(pb.StopRequest) == []


async def test_a_status_that_another_call_would_not_change_ends_the_watch(fake):
    fake.connections = [[RUNNING, fake.breaks(grpc.StatusCode.PERMISSION_DENIED, "certificate expired")]]
    with pytest.raises(NotPermitted, match="certificate expired"):
        await seen(fake)
