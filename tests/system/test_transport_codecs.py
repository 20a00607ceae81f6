"""A real coordinator and real daemons in one process; only the training is replaced, by a known change."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedloom_client.config import DataSource, SiteConfig
from fedloom_client.daemon import Daemon
from fedloom_client.training.orders import WorkerResult
from fedloom_common.digests import digest_of_file
from fedloom_common.runspec import RunSpec
from fedloom_server.app import coordinator
from fedloom_server.config import CoordinatorConfig

VALUES = 50_000
SITES = ("red", "green", "blue")


def change(site, round_):
    values = np.random.default_rng([SITES.index(site), round_]).standard_normal(VALUES)
    return (values * 1e-2).astype(np.float32)


@dataclass
class Group:
    """Trains by adding the site's change; remembers which models it was given."""

    site: str
    models: list[str] = field(default_factory=list)
    hangs_from: int = 1 << 30

    async def perform(self, order, on_progress):
        path = Path(order.model_path)
        self.models.append(digest_of_file(path))
        if order.round >= self.hangs_from:
            await asyncio.Event().wait()
        if order.work == "train":
            model = load_file(path)
            trained = {"w": model["w"] + change(self.site, order.round), "n": model["n"]}
            save_file(trained, order.update_path, {"format": "pt"})
        return WorkerResult(examples=4, tokens=8, metrics={"loss": 1.0}, update_path=None)

    async def stop(self):
        pass


class World:
    """One coordinator at a time, and daemons by site."""

    def __init__(self, folder):
        self.folder = folder
        self.config = CoordinatorConfig(
            listen="127.0.0.1:0", insecure=True, state_dir=folder / "coordinator", drain_s=0.2
        )
        self.groups = {name: Group(name) for name in SITES}
        self.daemons = {}
        (folder / "text.txt").write_text("to be or not to be " * 1000)

    def join(self, running, *names):
        for name in names:
            config = SiteConfig(
                coordinator=f"127.0.0.1:{running.port}",
                insecure=name,
                state_dir=self.folder / name,
                data={"texts": DataSource(files=(str(self.folder / "text.txt"),))},
                workers={"device": "cpu"},
            )
            daemon = Daemon(config, make_group=lambda data, folder, name=name: self.groups[name])
            self.daemons[name] = asyncio.create_task(daemon.run())

    async def leave(self, *names):
        for name in names:
            task = self.daemons.pop(name)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def enqueue(self, running, transport, rounds, **cohort):
        spec = RunSpec.model_validate(
            {
                "name": "codecs",
                "model": {"config": {"model_type": "gpt2"}},
                "data": "texts",
                "rounds": rounds,
                "cohort": {"min_sites": 3} | cohort,
                "local": {"steps": 1},
                "transport": transport,
            }
        )
        folder = self.folder / "initial"
        folder.mkdir()
        save_file(INITIAL, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        return await running.runs.submissions.enqueue(spec, folder)

    async def rounds_done(self, running, run, rounds):
        async with asyncio.timeout(60):
            while (run := running.store.run(run.id)).rounds_done < rounds:
                assert not run.state.is_end, run.reason
                await asyncio.sleep(0.02)
        return run

    async def ended(self, running, run):
        async with asyncio.timeout(60):
            while not (run := running.store.run(run.id)).state.is_end:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert run.state == "finished", run.reason
        return run


INITIAL = {
    "w": np.random.default_rng(7).standard_normal(VALUES).astype(np.float32),
    "n": np.arange(3),
}


@pytest.fixture
async def world(tmp_path):
    world = World(tmp_path)
    yield world
    await world.leave(*world.daemons)


def exact(rounds):
    """The model after so many rounds if nothing were rounded."""
    mean = [np.mean([change(site, number) for site in SITES], axis=0, dtype=np.float64) for number in rounds]
    return INITIAL["w"] + np.sum(mean, axis=0)


async def test_sites_work_on_the_coordinators_models_and_fetch_only_changes(world):
    async with coordinator(world.config) as running:
        world.join(running, *SITES)
        run = await world.ended(running, await world.enqueue(running, {"down": ["int8", "zstd"]}, 4))
        digests = [record.model_digest for record in running.store.rounds(run.id)]
        for group in world.groups.values():
            # each model is measured by the training that begins with it, and the last one by itself
            assert group.models == digests
        size = run.model_bytes
        for assignment in running.store.assignments(run.id):
            if assignment.work == "evaluate" or assignment.round > 1:
                assert 0 < assignment.bytes_down < size / 3
            else:
                assert assignment.bytes_down >= size
        told = load_file(running.store.files.path(run.model_digest))
        left_out = np.abs(told["w"] - exact(range(1, 5))).max()
        assert 0 < left_out < 0.05 / 127
        np.testing.assert_array_equal(told["n"], INITIAL["n"])


async def test_a_site_that_missed_rounds_fetches_the_whole_model_and_goes_on_with_changes(world):
    async with coordinator(world.config) as running:
        world.join(running, *SITES)
        cohort = {"quorum": 2, "min_sites": 2, "stall_s": 20}
        run = await world.enqueue(running, {"down": "int4"}, 10_000, **cohort)
        await world.rounds_done(running, run, 2)
        await world.leave("blue")
        await world.rounds_done(running, run, 5)
        world.groups["blue"].models.clear()
        world.join(running, "blue")
        await world.rounds_done(running, run, 8)
        for _ in range(200):
            if len(set(world.groups["blue"].models)) >= 3:
                break
            await asyncio.sleep(0.05)
        await running.runs.stop(run.id, "seen enough")
        digests = {record.model_digest for record in running.store.rounds(run.id)}
        assert set(world.groups["blue"].models) <= digests
        sizes = [a.bytes_down for a in running.store.assignments(run.id) if a.site == "blue" and a.round > 2]
        assert max(sizes) >= run.model_bytes
        assert any(0 < size < run.model_bytes / 3 for size in sizes)


@pytest.mark.parametrize("who", ["coordinator", "site"])
async def test_a_restart_keeps_both_ends_equal(world, who):
    async with coordinator(world.config) as running:
        world.join(running, *SITES)
        run = await world.enqueue(running, {"down": "int8"}, 6)
        await world.rounds_done(running, run, 2)
        if who == "site":
            await world.leave("red")
            world.join(running, "red")
            run = await world.ended(running, run)
        else:
            await world.leave(*SITES)
    if who == "coordinator":
        async with coordinator(world.config) as running:
            world.join(running, *SITES)
            run = await world.ended(running, run)
            told = load_file(running.store.files.path(run.model_digest))
    else:
        told = load_file(world.config.state_dir / "files" / run.model_digest.replace(":", "-"))
    digests = [group.models[-1] for group in world.groups.values()]
    assert digests == [run.model_digest] * 3
    np.testing.assert_allclose(told["w"], exact(range(1, 7)), atol=0.05 / 127)


def left_out(folder):
    """What one end has yet to tell: its newest round counts before the file is renamed."""
    files = (folder / f"{name}.safetensors" for name in ("pending", "delivered", "kept"))
    return load_file(next(file for file in files if file.exists()))["w"].astype(np.float64)


@pytest.mark.parametrize(
    "transport",
    [
        {"up": [{"name": "topk", "fraction": 0.1}, "int8", "zstd"], "down": ["int8", "zstd"]},
        {"up": {"name": "int4", "error_feedback": True}, "down": [{"name": "topk", "fraction": 0.2}, "bf16"]},
    ],
    ids=["topk-up", "topk-down"],
)
async def test_over_restarts_of_both_ends_nothing_of_any_change_is_lost_or_told_twice(world, transport):
    """What the model was told, and what sites and coordinator keep, are all that sites have learnt."""
    for group in world.groups.values():
        group.hangs_from = 5
    async with coordinator(world.config) as running:
        world.join(running, *SITES)
        run = await world.enqueue(running, transport, 5)
        await world.rounds_done(running, run, 1)
        await world.leave("red")
        world.join(running, "red")
        await world.rounds_done(running, run, 2)
        await world.leave(*SITES)
    async with coordinator(world.config) as running:
        world.join(running, *SITES)
        await world.rounds_done(running, run, 4)
        async with asyncio.timeout(60):
            while len({group.models[-1] for group in world.groups.values()}) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        run = running.store.run(run.id)
        told = load_file(running.store.files.path(run.model_digest))["w"]
        kept = left_out(running.store.spool.residual_folder(run.id))
        sites = [left_out(world.folder / name / "runs" / run.id / "residual") for name in SITES]
    assert np.abs(kept).max() > 1e-5
    assert np.abs(sites).max() > 1e-5
    np.testing.assert_allclose(told + kept + np.mean(sites, axis=0), exact(range(1, 5)), atol=5e-6)
