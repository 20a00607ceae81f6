"""Claims about the training processes of a real site: torchrun, two ranks, a small GPT."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from faults.federation import FEDLOOM, Federation, federation_of
from faults.ledger import counted, trained

TINY = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}


async def training(federation: Federation, temporary: Path) -> str:
    """A run of two rounds whose first is being trained by two ranks; gives its id."""
    (federation.site_folder("oslo") / "data/a.txt").write_text("to be or not to be " * 2000)
    federation.configure("oslo", workers={"nproc_per_node": 2, "device": "cpu", "threads_per_rank": 1,
                                          "collective_timeout_s": 5})  # fmt: skip
    temporary.mkdir()
    federation.start_coordinator()
    start(federation, temporary)
    run = await federation.submit(
        TINY, rounds=2, task={"kind": "causal_lm", "context_tokens": 64}, cohort={"stall_s": 200},
        local={"steps": 300, "batch_examples": 4, "checkpoint_every": 20},
    )  # fmt: skip
    await federation.until(lambda: len(ranks(federation)) == 2, 100)
    checkpoints = federation.site_folder("oslo") / "state/runs"
    await federation.until(lambda: any("checkpoint" in path.name for path in checkpoints.rglob("*")), 100)
    return run


def start(federation: Federation, temporary: Path) -> None:
    """Start the daemon that users have, with a folder of its own for what is temporary."""
    with federation.environment_of({"TMPDIR": str(temporary)}):
        config = federation.site_folder("oslo") / "site.yaml"
        federation.start("oslo", [FEDLOOM, "client", "--config", config])


def ranks(federation: Federation) -> list[psutil.Process]:
    found = psutil.Process(federation.running["oslo"].pid).children(recursive=True)
    return [process for process in found if "fedloom_client.training.worker" in command(process)]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has just ended


@pytest.mark.faults(
    injected="kill -9 of one of two ranks, as when memory runs out; SIGSTOP of one in the next round",
    must="the ranks are started again and go on from the last local checkpoint; both rounds count at once",
)
@pytest.mark.timeout(600)
async def test_a_killed_and_a_stopped_rank_are_replaced_and_the_round_counts(tmp_path, seen):
    async with federation_of(tmp_path, "oslo") as federation:
        run = await training(federation, tmp_path / "temporary")
        before = {process.pid for process in ranks(federation)}
        os.kill(max(before), signal.SIGKILL)
        await federation.until(
            lambda: len(now := {process.pid for process in ranks(federation)}) == 2 and now != before, 100
        )
        await federation.until(lambda: "round=2 work=train" in federation.log("oslo"), 150)
        stopped = ranks(federation)[-1]
        stopped.send_signal(signal.SIGSTOP)
        answer = await federation.finished(run, 200)
        assert [counted(record) for record in trained(answer)] == [{"oslo": 1200}] * 2
        assert [record.attempt for record in trained(answer)] == [1, 1]
    seconds = [record.ended_at_s - record.started_at_s for record in answer.rounds]
    seen(f"rounds of {seconds[0]:.0f} s and {seconds[1]:.0f} s, each at its first attempt")


@pytest.mark.faults(
    injected="kill -9 of a daemon whose ranks train",
    must="no rank outlives it; the next daemon goes on, and leaves no temporary folder behind",
)
@pytest.mark.timeout(600)
async def test_a_killed_daemon_leaves_no_rank_and_no_temporary_folder(tmp_path, seen):
    temporary = tmp_path / "temporary"
    async with federation_of(tmp_path, "oslo") as federation:
        run = await training(federation, temporary)
        daemon = psutil.Process(federation.running["oslo"].pid)
        children = daemon.children(recursive=True)
        federation.kill("oslo")
        await federation.until(lambda: not any(child.is_running() for child in children), 20)
        left = set(temporary.glob("fedloom-*"))
        assert left, "a kill gives nobody the time to clear away"
        start(federation, temporary)
        await federation.until(lambda: not any(folder.exists() for folder in left), 60)
        answer = await federation.finished(run, 200)
        assert [record.attempt for record in trained(answer)] == [1, 1]
        federation.running["oslo"].terminate()
        federation.running["oslo"].wait(30)
        assert not list(temporary.glob("fedloom-*"))
    seen(f"{len(children)} processes gone at once, {len(left)} folder cleared away by the next daemon")
