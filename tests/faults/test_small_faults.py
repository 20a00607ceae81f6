"""Claims about transfers on bad lines: a coordinator and a daemon in this process, and the proxy between."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from faults.nullsite import NullGroup, Training
from faults.proxy import Fault, Plan, Proxy, Way
from safetensors.numpy import load_file, save_file

from fedloom_client.config import SiteConfig
from fedloom_client.daemon import Daemon
from fedloom_common import channels
from fedloom_common.runspec import RunSpec
from fedloom_server.app import Coordinator, coordinator
from fedloom_server.config import CoordinatorConfig
from fedloom_server.records import Run

SIZE_BYTES = 8 << 20
MODEL = {
    "wide": np.arange(SIZE_BYTES // 4 - 1000, dtype=np.float32) / 1000,
    "bias": np.linspace(-1, 1, 1000, dtype=np.float32),
}


class Line:
    """A run of one round over the proxy."""

    def __init__(self, running: Coordinator, proxy: Proxy, folder: Path) -> None:
        self.running = running
        self.proxy = proxy
        self.folder = folder

    async def result(self, *plans: Plan) -> dict[str, np.ndarray]:
        """What comes out of the round when these faults happen on its way."""
        self.proxy.plan(*plans)
        initial = self.folder / "initial"
        initial.mkdir()
        save_file(MODEL, initial / "model.safetensors", {"format": "pt"})
        (initial / "config.json").write_text('{"model_type": "gpt2"}')
        spec = RunSpec.model_validate(
            {
                "name": "faults",
                "model": {"config": {"model_type": "gpt2"}},
                "data": "texts",
                "rounds": 1,
                "local": {"steps": 1, "batch_examples": 1},
                "evaluation": {"every_rounds": 0, "initial": False},
            }
        )
        run = await self.running.runs.submissions.enqueue(spec, initial)
        ended = await self._ended(run)
        assert ended.state == "finished", ended.reason
        assert len(self.proxy.done) == len(plans)
        return load_file(self.running.store.files.path(ended.model_digest))

    async def _ended(self, run: Run) -> Run:
        async with asyncio.timeout(60):
            while not self.running.store.run(run.id).state.is_end:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return self.running.store.run(run.id)

    def surplus(self, way: Way) -> float:
        """What was sent more than once, and what it took to say so, as a share of the model."""
        return self.proxy.forwarded_bytes[way] / SIZE_BYTES - 1


@pytest.fixture
async def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Line]:
    monkeypatch.setattr("fedloom_client.backoff.Backoff.next_s", lambda self: 0.05)
    config = CoordinatorConfig(
        listen="127.0.0.1:0", insecure=True, state_dir=tmp_path / "coordinator", drain_s=0.1
    )
    (tmp_path / "a.txt").write_text("to be or not to be")
    async with coordinator(config) as running, Proxy(running.port) as proxy:
        facts = {
            "coordinator": f"127.0.0.1:{proxy.port}",
            "insecure": "oslo",
            "state_dir": tmp_path / "site",
            "data": {"texts": {"files": [str(tmp_path / "*.txt")]}},
            "workers": {"device": "cpu"},
        }
        training = Training(site="oslo", log=str(tmp_path / "trainings.jsonl"), negates=True)
        site = Daemon(SiteConfig.model_validate(facts), make_group=lambda name, folder: NullGroup(training))
        task = asyncio.create_task(site.run())
        yield Line(running, proxy, tmp_path)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def assert_negated(result: dict[str, np.ndarray]) -> None:
    assert sorted(result) == sorted(MODEL)
    for name, tensor in MODEL.items():
        np.testing.assert_array_equal(result[name], -tensor)


@pytest.mark.parametrize("way", Way)
async def test_ten_cuts_change_nothing_and_never_begin_from_the_start(line, way):
    chance = random.Random(7)
    places = chance.sample(range(SIZE_BYTES // 20, SIZE_BYTES), 10)
    kinds = [chance.choice((Fault.RESET, Fault.END)) for _ in places]
    plans = [Plan(way=way, at_bytes=place, fault=kind) for place, kind in zip(places, kinds, strict=True)]
    assert_negated(await line.result(*plans))
    assert line.surplus(way) < 0.5  # from the start each time it would be five


@pytest.mark.parametrize("way", Way)
async def test_a_flipped_bit_is_caught_and_costs_no_second_transfer(line, way):
    assert_negated(await line.result(Plan(way=way, at_bytes=SIZE_BYTES // 2, fault=Fault.FLIP)))
    assert 0 < line.surplus(way) < 0.75


async def test_a_line_that_swallows_everything_is_given_up_and_the_upload_goes_on(line, monkeypatch):
    quick = {
        "grpc.keepalive_time_ms": 1000,
        "grpc.keepalive_timeout_ms": 500,
        "grpc.http2.ping_timeout_ms": 500,
    }
    options = [(name, quick.get(name, value)) for name, value in channels.CHANNEL_OPTIONS]
    monkeypatch.setattr(channels, "CHANNEL_OPTIONS", options)
    plan = Plan(way=Way.UP, at_bytes=SIZE_BYTES // 2, fault=Fault.BLACKHOLE)
    assert_negated(await line.result(plan))
    assert line.surplus(Way.UP) < 0.5
