"""Real launchers and ranks: torchrun, gloo, kill -9."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file

from fedloom_client.config import DataSource, Workers
from fedloom_client.training.orders import Order, WorkerProgress
from fedloom_client.workers import WorkerGroup
from fedloom_common.errors import TrainingFailed

MakeOrder = Callable[..., Order]
ENDLESS = {"steps": 1_000_000, "batch_examples": 8}
SGD = {"name": "sgd", "lr": 0.1}
ADAMW = {"name": "adamw", "eps": 1e-3}  # so large that rounding of tiny gradients does not matter


def two_ranks(**changes: Any) -> Workers:
    return Workers(**({"nproc_per_node": 2, "device": "cpu", "threads_per_rank": 1} | changes))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ``pair``."""
    return tmp_path_factory.mktemp("pair")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(texts: DataSource, home: Path) -> AsyncIterator[WorkerGroup]:
    """Two ranks that stay warm over the tests of this module."""
    group = WorkerGroup(workers=two_ranks(), source=texts, directory=home)
    yield group
    await group.stop()


def processes_of(directory: Path) -> list[psutil.Process]:
    """The launcher and the ranks of a group, by the run folder that their environment names."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HF_HOME") == str(directory / "huggingface"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def rank_of(directory: Path, rank: int) -> psutil.Process:
    (process,) = [item for item in processes_of(directory) if item.environ().get("RANK") == str(rank)]
    return process


async def until_training(task: asyncio.Task[Any], progress: list[WorkerProgress], steps: int = 1) -> None:
    while not (progress and progress[-1].phase == "train" and progress[-1].done >= steps):
        assert not task.done(), task.result()
        await asyncio.sleep(0.02)


async def until_gone(directory: Path) -> None:
    deadline = time.monotonic() + 60
    while left := processes_of(directory):
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.05)


def assert_same_tensors(one: str, other: Path, tolerance: float) -> None:
    first, second = load_file(one), load_file(other)
    assert list(first) == list(second)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=tolerance, rtol=0)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
async def test_two_ranks_take_the_steps_of_one_process(
    pair: WorkerGroup, alone: Any, make_order: MakeOrder, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    local = {"steps": 1, "optimizer": optimizer, "accumulation_steps": 2, "keep_optimizer_state": False}
    order = make_order(local=local)
    shared = await pair.perform(order, lambda _: None)
    single = alone.perform(make_order(local=local, update_path=str(tmp_path / "single")))
    assert_same_tensors(order.update_path, tmp_path / "single", 1e-6)
    assert shared.metrics["loss"] == pytest.approx(single.metrics["loss"], rel=1e-5)
    assert (shared.examples, shared.tokens) == (single.examples, single.tokens) == (8, 8 * 31)


@pytest.mark.asyncio(loop_scope="module")
async def test_two_ranks_measure_every_held_out_example_once(
    pair: WorkerGroup, alone: Any, make_order: MakeOrder
) -> None:
    order = make_order("evaluate", spec={"evaluation": {"max_examples": 15}})
    shared, single = await pair.perform(order, lambda _: None), alone.perform(order)
    assert shared.examples == single.examples == 15
    assert shared.metrics["loss"] == pytest.approx(single.metrics["loss"], rel=1e-6)


@pytest.mark.asyncio(loop_scope="module")
async def test_warm_ranks_keep_their_processes_and_listen_on_loopback_only(
    pair: WorkerGroup, home: Path, make_order: MakeOrder
) -> None:
    await pair.perform(make_order("evaluate"), lambda _: None)
    before = {process.pid for process in processes_of(home)}
    told: list[WorkerProgress] = []
    await pair.perform(make_order("evaluate"), told.append)
    assert {process.pid for process in processes_of(home)} == before
    assert len(before) == 3
    assert {report.phase for report in told} <= {"evaluate"}, "nothing is started or prepared again"
    listening = [
        connection.laddr.ip
        for process in processes_of(home)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}


@pytest.mark.asyncio(loop_scope="module")
async def test_an_order_that_cannot_be_done_says_why_and_costs_no_restart(
    pair: WorkerGroup, home: Path, make_order: MakeOrder
) -> None:
    await pair.perform(make_order("evaluate"), lambda _: None)
    before = {process.pid for process in processes_of(home)}
    with pytest.raises(TrainingFailed, match="batch_examples is 7, which this site's 2 ranks"):
        await pair.perform(make_order(local={"batch_examples": 7}), lambda _: None)
    await pair.perform(make_order(), lambda _: None)
    assert {process.pid for process in processes_of(home)} == before


@pytest.mark.asyncio(loop_scope="module")
async def test_a_cancelled_order_stops_soon_and_the_same_ranks_do_the_next(
    pair: WorkerGroup, home: Path, make_order: MakeOrder
) -> None:
    progress: list[WorkerProgress] = []
    order = make_order(local=ENDLESS)
    task = asyncio.create_task(pair.perform(order, progress.append))
    await until_training(task, progress)
    before = {process.pid for process in processes_of(home)}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(order.update_path).exists()
    assert (await pair.perform(make_order(), lambda _: None)).examples == 32
    assert {process.pid for process in processes_of(home)} == before


@pytest.mark.asyncio(loop_scope="module")
async def test_a_group_killed_between_orders_comes_back_with_the_next(
    pair: WorkerGroup, home: Path, make_order: MakeOrder
) -> None:
    await pair.perform(make_order("evaluate"), lambda _: None)
    (launcher,) = [process for process in processes_of(home) if "RANK" not in process.environ()]
    launcher.kill()
    await until_gone(home)
    assert (await pair.perform(make_order("evaluate"), lambda _: None)).examples == 18


@pytest.mark.asyncio(loop_scope="module")
async def test_progress_comes_about_once_a_second_with_loss_and_throughput(
    pair: WorkerGroup, make_order: MakeOrder
) -> None:
    reports: asyncio.Queue[WorkerProgress] = asyncio.Queue()
    started = time.monotonic()
    task = asyncio.create_task(pair.perform(make_order(local=ENDLESS), reports.put_nowait))
    seen: list[WorkerProgress] = []
    async with asyncio.timeout(60):
        while len(seen) < 4:
            report = await reports.get()
            seen += [report] if report.phase == "train" and report.done else []
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started > 4
    assert all(report.loss and report.tokens_per_s for report in seen)
    assert [report.done for report in seen] == sorted({report.done for report in seen})


@pytest.mark.parametrize("checkpoint_every", [None, 10], ids=["from-the-start", "from-a-checkpoint"])
async def test_a_killed_rank_is_restarted_and_the_order_gives_the_undisturbed_result(
    alone: Any, texts: DataSource, make_order: MakeOrder, tmp_path: Path, checkpoint_every: int | None
) -> None:
    progress: list[WorkerProgress] = []
    directory = tmp_path / "group"
    group = WorkerGroup(workers=two_ranks(), source=texts, directory=directory)
    local = {"steps": 200, "batch_examples": 8, "optimizer": {"lr": 1e-5}}
    order = make_order(local=local | {"checkpoint_every": checkpoint_every})
    task = asyncio.create_task(group.perform(order, progress.append))
    await until_training(task, progress, steps=checkpoint_every or 1)
    rank_of(directory, 1).kill()
    result = await task
    await group.stop()
    phases = [item.phase for item in progress]
    assert [phase for phase, _ in groupby(phases)].count("start") == 2
    went_on_at = next(item for item in reversed(progress[phases.index("train") :]) if item.loss is None)
    assert (went_on_at.done > 0) is (checkpoint_every is not None)
    assert result.examples == 200 * 8
    alone.perform(make_order(local=local, update_path=str(tmp_path / "undisturbed")))
    assert_same_tensors(order.update_path, tmp_path / "undisturbed", 1e-5)
    assert processes_of(directory) == []


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [1, 0])
async def test_a_launcher_killed_while_its_group_starts_is_replaced_if_there_are_restarts(
    texts: DataSource, make_order: MakeOrder, tmp_path: Path, restarts: int
) -> None:
    directory = tmp_path / "group"
    group = WorkerGroup(workers=two_ranks(max_restarts=restarts), source=texts, directory=directory)
    task = asyncio.create_task(group.perform(make_order(), lambda _: None))
    while not (launchers := [item for item in processes_of(directory) if "RANK" not in item.environ()]):
        assert not task.done(), task.result()
        await asyncio.sleep(0.02)
    launchers[0].kill()
    if restarts:
        assert (await task).examples == 4 * 8
    else:
        with pytest.raises(TrainingFailed, match="the launcher ended with status -9"):
            await task
    await group.stop()
    assert processes_of(directory) == []


async def test_a_rank_that_always_dies_fails_the_order_with_its_traceback(
    alone: Any, texts: DataSource, make_order: MakeOrder, assets: Path, tmp_path: Path
) -> None:
    unfit = tmp_path / "unfit"
    unfit.mkdir()
    for file in assets.iterdir():
        text = file.read_text()
        (unfit / file.name).write_text(text.replace('"n_head": 2', '"n_head": 3'))
    workers = two_ranks(nproc_per_node=1, max_restarts=1)
    group = WorkerGroup(workers=workers, source=texts, directory=tmp_path / "group")
    with pytest.raises(TrainingFailed) as caught:
        await group.perform(make_order(assets_dir=str(unfit)), lambda _: None)
    lines = str(caught.value).splitlines()
    assert lines[0] == "rank 0 failed with ValueError:"
    assert any(line.startswith("ValueError: ") and "must be divisible by num_heads" in line for line in lines)
    assert len(lines) < 20
    assert processes_of(tmp_path / "group") == []
    logs = list((tmp_path / "group" / "logs").glob("*/attempt_*/0/stderr.log"))
    assert len(logs) == 2


DAEMON = """
import asyncio, json, sys
from pathlib import Path
from fedloom_client.config import DataSource, Workers
from fedloom_client.training.orders import Order
from fedloom_client.workers import WorkerGroup
facts = json.load(open(sys.argv[1]))
group = WorkerGroup(
    workers=Workers(**facts["workers"]),
    source=DataSource(**facts["source"]),
    directory=Path(facts["directory"]),
)
asyncio.run(group.perform(Order(**facts["order"]), lambda progress: print(progress.phase, flush=True)))
"""


async def test_no_process_outlives_a_killed_daemon(
    texts: DataSource, make_order: MakeOrder, tmp_path: Path
) -> None:
    facts = {
        "workers": two_ranks().model_dump(),
        "source": texts.model_dump(),
        "directory": str(tmp_path / "group"),
        "order": asdict(make_order(local=ENDLESS)),
    }
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, str(tmp_path / "facts.json"), stdout=subprocess.PIPE
    )
    assert daemon.stdout is not None
    while (await daemon.stdout.readline()).strip() != b"train":
        assert daemon.returncode is None
    assert len(processes_of(tmp_path / "group")) == 3
    os.kill(daemon.pid, signal.SIGKILL)
    await daemon.wait()
    await until_gone(tmp_path / "group")


FURTHER_HOST = """
import asyncio, json, sys
from fedloom_client.config import SiteConfig
from fedloom_client.furtherhost import join_group
asyncio.run(join_group(SiteConfig(**json.load(open(sys.argv[1])))))
"""


@pytest.mark.parametrize(
    ("groups", "sign"),
    [(1, signal.SIGINT), pytest.param(3, signal.SIGTERM, marks=pytest.mark.slow)],
    ids=["one-group", "three-groups"],
)
async def test_a_further_host_lends_its_ranks_to_every_group_until_interrupted(
    alone: Any, texts: DataSource, make_order: MakeOrder, tmp_path: Path, groups: int, sign: signal.Signals
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = two_ranks(nproc_per_node=1, nnodes=2, rdzv_endpoint=endpoint, max_restarts=0)
    config = {
        "coordinator": "localhost:1",
        "insecure": "a",
        "state_dir": str(tmp_path / "further"),
        "data": {"texts": texts.model_dump()},
        "workers": workers.model_dump(),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    further = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FURTHER_HOST, str(tmp_path / "config.json")
    )
    local = {"optimizer": {"name": "sgd", "lr": 0.1}}
    alone.perform(make_order(local=local, update_path=str(tmp_path / "single")))
    for _ in range(groups):
        group = WorkerGroup(workers=workers, source=texts, directory=tmp_path / "group")
        order = make_order(local=local)
        await group.perform(order, lambda _: None)
        assert [len(processes_of(tmp_path / name)) for name in ("group", "further")] == [2, 2]
        assert_same_tensors(order.update_path, tmp_path / "single", 1e-6)
        await group.stop()
    further.send_signal(sign)
    assert await further.wait() == 0
    assert processes_of(tmp_path / "further") == []


@pytest.mark.slow  # torchrun gives a rank that ignores SIGTERM 30 seconds
async def test_a_rank_that_stands_still_is_given_up_after_the_collective_timeout(
    texts: DataSource, make_order: MakeOrder, tmp_path: Path
) -> None:
    progress: list[WorkerProgress] = []
    workers = two_ranks(collective_timeout_s=2, max_restarts=0)
    group = WorkerGroup(workers=workers, source=texts, directory=tmp_path / "group")
    task = asyncio.create_task(group.perform(make_order(local=ENDLESS), progress.append))
    await until_training(task, progress)
    rank_of(tmp_path / "group", 1).suspend()
    started = time.monotonic()
    with pytest.raises(TrainingFailed, match=r"(?s)rank 0 failed with \w+:.*[Tt]imed out"):
        await task
    assert time.monotonic() - started < 120
    assert processes_of(tmp_path / "group") == []


async def test_several_hosts_without_a_meeting_point_are_refused(texts: DataSource, tmp_path: Path) -> None:
    group = WorkerGroup(workers=two_ranks(nnodes=2), source=texts, directory=tmp_path)
    order = Order(id="a", work="evaluate", run_id="r", round=0, model_path="", assets_dir="", spec={})
    with pytest.raises(TrainingFailed, match=r"nnodes is 2, but workers\.rdzv_endpoint is not set"):
        await group.perform(order, lambda _: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a CUDA device")
async def test_a_host_without_the_device_asked_for_says_so_without_restarts(
    texts: DataSource, make_order: MakeOrder, tmp_path: Path
) -> None:
    group = WorkerGroup(workers=Workers(device="cuda"), source=texts, directory=tmp_path)
    with pytest.raises(TrainingFailed, match=r"workers\.device is cuda, but this host has no CUDA device"):
        await group.perform(make_order(), lambda _: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this host has no CUDA device")
async def test_every_gpu_trains_as_one_process_on_the_cpu(
    alone: Any, texts: DataSource, make_order: MakeOrder, tmp_path: Path
) -> None:
    local = {"batch_examples": 8 * torch.cuda.device_count(), "precision": "fp32"}
    group = WorkerGroup(workers=Workers(), source=texts, directory=tmp_path / "group")
    order = make_order(local=local)
    shared = await group.perform(order, lambda _: None)
    single = alone.perform(make_order(local=local, update_path=str(tmp_path / "single")))
    # AdamW magnifies small gradients' rounding
    assert_same_tensors(order.update_path, tmp_path / "single", 1e-3)
    assert shared.metrics["loss"] == pytest.approx(single.metrics["loss"], rel=1e-4)
    half = await group.perform(make_order("train", 2, local=local | {"precision": "auto"}), lambda _: None)
    assert half.metrics["loss"] == pytest.approx(single.metrics["loss"], rel=0.1)
    await group.stop()
