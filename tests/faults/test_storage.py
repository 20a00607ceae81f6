"""Claims about disks that are full or broken: small file systems, and errors given by strace."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults.federation import Federation, federation_of
from faults.ledger import assert_every_site_counted_once, assert_mean_of_what_counted, begun, trained
from faults.nullsite import Tensors

EXAMPLES = {"bergen": 3, "oslo": 5}
MODEL_BYTES = 7_901_728
MIB = 1 << 20

needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of so many bytes, in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, *, but_bytes: int = 0) -> Path:
    """Take all space but so many bytes."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        wanted = shutil.disk_usage(folder).free - but_bytes
        os.posix_fallocate(file.fileno(), 0, max(1, wanted))
    return filler


async def submitted(federation: Federation, **changes: object) -> tuple[str, Tensors]:
    """A run that waits for its sites, and its initial model."""
    federation.start_coordinator()
    cohort = {"min_sites": 2, "stall_s": 60, "attempts": 1000}
    run = await federation.submit(rounds=3, cohort=cohort, **changes)
    answer = await federation.get(run)
    assert answer is not None
    return run, federation.model(answer.run.model.digest)


async def assert_all_counted(federation: Federation, run: str, initial: Tensors) -> None:
    """The run ends, with every training counted once, and with the mean by hand."""
    answer = await federation.finished(run, 120)
    assert_every_site_counted_once(federation, answer, EXAMPLES)
    assert_mean_of_what_counted(initial, answer, federation.model(answer.run.model.digest))


@needs_mount
@pytest.mark.faults(
    injected="a full disk at the coordinator while updates are uploaded, for 8 s",
    must="the uploads wait and go on from the last byte when there is room; nothing is trained again",
)
async def test_a_full_disk_during_an_upload_only_delays_it(tmp_path, seen):
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        with small_disk(federation.state, 100 * MIB) as disk:
            run, initial = await submitted(federation)
            for site, examples in EXAMPLES.items():
                federation.train(site, examples=examples, seconds=1.0)
            filler = fill(disk, but_bytes=5 * MIB)
            federation.start_sites()
            await federation.until(
                lambda: "no space left" in federation.log("oslo") + federation.log("bergen")
            )
            await asyncio.sleep(8)
            filler.unlink()
            await assert_all_counted(federation, run, initial)
            federation.stop()
    seen("3 rounds, each update trained and counted once")


@needs_mount
@pytest.mark.faults(
    injected="a full disk at the coordinator while updates are averaged, for 8 s",
    must="the updates stay, and are averaged when there is room; nobody has to resume the run",
)
async def test_a_full_disk_during_a_fold_only_delays_it(tmp_path, seen):
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        with small_disk(federation.state, 100 * MIB) as disk:
            run, initial = await submitted(federation)
            federation.train("bergen", examples=EXAMPLES["bergen"])
            federation.train("oslo", examples=EXAMPLES["oslo"], seconds=6.0)
            federation.start_sites()
            await federation.until(lambda: "site done" in federation.log("coordinator"))
            filler = fill(disk, but_bytes=MODEL_BYTES + 2 * MIB)  # oslo's update, and not the mean
            await federation.until(lambda: "no space left" in federation.log("coordinator"))
            await asyncio.sleep(8)
            filler.unlink()
            await assert_all_counted(federation, run, initial)
            federation.stop()
    seen("3 rounds, each update trained and counted once")


@needs_mount
@pytest.mark.faults(
    injected="not one free byte at the coordinator, its database included, for 8 s in the middle of a round",
    must="nothing is told to have happened that is not durable; all goes on when there is room",
)
async def test_a_full_database_only_delays_the_run(tmp_path, seen):
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        with small_disk(federation.state, 100 * MIB) as disk:
            run, initial = await submitted(federation)
            for site, examples in EXAMPLES.items():
                federation.train(site, examples=examples, seconds=2.0)
            federation.start_sites()
            await federation.until(lambda: "work begins" in federation.log("oslo"))
            filler = fill(disk)
            await federation.until(lambda: "no space left" in federation.log("coordinator"))
            await asyncio.sleep(8)
            filler.unlink()
            await assert_all_counted(federation, run, initial)
            federation.stop()
    seen("3 rounds, each update trained and counted once")


@needs_mount
@pytest.mark.faults(
    injected="a full disk at a site while it downloads the model, and later while it writes its update",
    must="the site says what is missing and where; the round is tried again until there is room",
)
async def test_a_full_disk_at_a_site_is_told_and_tried_again(tmp_path, seen):
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        with small_disk(federation.site_folder("oslo") / "state", 100 * MIB) as disk:
            run, initial = await submitted(federation)
            for site, examples in EXAMPLES.items():
                federation.train(site, examples=examples, seconds=1.0)
            filler = fill(disk, but_bytes=5 * MIB)
            federation.start_sites()
            await federation.until(lambda: "no space left" in federation.log("oslo"))
            filler.unlink()
            began = sum(begun(federation).values())
            await federation.until(lambda: sum(begun(federation).values()) > began + 2)
            filler = fill(disk, but_bytes=5 * MIB)
            told = federation.log("oslo").count("no space left")
            await federation.until(lambda: federation.log("oslo").count("no space left") > told)
            filler.unlink()
            answer = await federation.finished(run, 120)
            assert_mean_of_what_counted(initial, answer, federation.model(answer.run.model.digest))
            assert "no space left" in federation.log("coordinator")
            federation.stop()
    seen(f"attempts: {', '.join(str(record.attempt) for record in trained(answer))}")


@needs_strace
@pytest.mark.faults(
    injected="EIO from the coordinator's n-th sync of the database or of a model, four times",
    must="it never goes on as if that were durable; after a restart, and at most a resume, all models are "
    "those of the mean by hand",
)
async def test_a_disk_that_does_not_sync_is_never_believed(tmp_path, seen):
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        federation.configure("coordinator", keep_models=100)
        run, initial = await submitted(federation, evaluation={"every_rounds": 1, "initial": True})
        for site, examples in EXAMPLES.items():
            federation.train(site, examples=examples)
        federation.start_sites()
        for call, number in (("fsync", 2), ("fdatasync", 3), ("fsync", 5), ("fdatasync", 9)):
            federation.kill("coordinator")
            broken = f"inject={call}:error=EIO:when={number}+"
            wrapper = ["strace", "-f", "-D", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", broken]
            federation.start_coordinator(wrapper=wrapper)
            await asyncio.sleep(6)
        federation.kill("coordinator")
        federation.start_coordinator()
        answer = await federation.ended_after_resumes(run, 120)
        assert_mean_of_what_counted(initial, answer, federation.model(answer.run.model.digest))
    seen("models as by hand")
