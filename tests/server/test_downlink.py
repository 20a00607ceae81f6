"""The way down: what is told becomes the model, and what is left out is told later."""

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import decode_model
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import BadSpec
from fedloom_common.tensorfiles import TensorFile
from fedloom_server.app import coordinator
from fedloom_server.config import KeepModels
from fedloom_server.downlink import delta_to, publish
from fedloom_server.records import Round, RoundState, Run, RunState
from fedloom_server.retention import drop_old_models
from fedloom_server.store import Store

PIECE = 1 << 16
LOSSY = ["int8", "int4", ["topk", "int8", "zstd"]]


class Killed(BaseException):
    """The coordinator ends here."""


class Way:
    """The rounds of a run whose updates are thought of: each mean is the model plus ``step``."""

    def __init__(self, folder, spec, stages, initial):
        self.folder, self.spec = folder, spec(transport={"down": stages})
        self.store = Store(folder)
        save_file(initial, folder / "initial", {"format": "pt"})
        stored = self.store.files.put(folder / "initial")
        run = Run(
            id="run", name="run", spec_json=self.spec.model_dump_json(), state=RunState.RUNNING,
            submitted_at_s=1.0, assets=[], model_digest=stored.digest, model_bytes=stored.size_bytes,
        )  # fmt: skip
        self.store.save(run)

    @property
    def run(self):
        return self.store.run("run")

    def restart(self):
        self.store.close()
        self.store = Store(self.folder)

    def model(self):
        return load_file(self.store.files.path(self.run.model_digest))

    def residual(self):
        """What the newest round has left out."""
        folder = self.store.spool.residual_folder("run")
        pending, kept = folder / "pending.safetensors", folder / "kept.safetensors"
        return load_file(pending if pending.exists() else kept)

    def round(self, number, step):
        """One round, unless it is durable already, as rounds.py takes it."""
        run = self.run
        if run.rounds_done >= number:
            return None
        model = self.model()
        mean = self.store.spool.folder / f"run.{number}.model"
        save_file({name: tensor + step[name] for name, tensor in model.items()}, mean, {"format": "pt"})
        record = Round(
            run_id="run", number=number, state=RoundState.AGGREGATING,
            base_digest=run.model_digest, started_at_s=1.0,
        )  # fmt: skip
        published = publish(self.store, run, record, mean)
        record.model_digest = run.model_digest = published.model.digest
        record.model_bytes = run.model_bytes = published.model.size_bytes
        if published.delta:
            record.delta_digest = published.delta.file.digest
            record.delta_bytes = published.delta.file.size_bytes
        record.state, run.rounds_done = RoundState.EVALUATING, number
        self.store.save(run, record)
        self.store.clear_spool()
        return record

    def site_decodes(self, held, out):
        """The model that a site makes of the one that it holds."""
        chain = Chain(self.spec.transport.down)
        delta = delta_to(self.store, self.run, self.run.model_digest)
        assert digest_of_file(held) == delta.base_digest
        with TensorFile(held) as base:
            decode_model(
                self.store.files.path(delta.file.digest),
                chain,
                base=base,
                base_digest=delta.base_digest,
                out=out,
            )
        return out


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here cuts power


def initial(dtype=torch.float32, size=PIECE + 700):
    values = torch.tensor(np.random.default_rng(0).standard_normal(size), dtype=torch.float32)
    return {"w": values.to(dtype), "n": torch.tensor([3, 4])}


def step(number, size=PIECE + 700):
    """Large changes here and there, and everywhere a small steady one that a codec alone would never tell."""
    random = np.random.default_rng(number)
    values = np.full(size, 1e-4)
    values[random.integers(0, size, size // 20)] += random.standard_normal(size // 20) * 0.05
    return {"w": torch.tensor(values, dtype=torch.float32), "n": torch.tensor([0, 0])}


@pytest.mark.parametrize("stages", LOSSY, ids=str)
def test_in_50_rounds_site_and_coordinator_stay_equal_and_nothing_is_lost(tmp_path, spec, stages, quick):
    way = Way(tmp_path, spec, stages, initial())
    site = tmp_path / "site.0"
    site.write_bytes(way.store.files.path(way.run.model_digest).read_bytes())
    wanted, largest = initial()["w"].double(), 0.0
    for number in range(1, 51):
        way.round(number, step(number))
        site = way.site_decodes(site, tmp_path / f"site.{number % 2}")
        assert digest_of_file(site) == way.run.model_digest
        wanted += step(number)["w"]
        largest = max(largest, way.residual()["w"].abs().max().item())
        drop_old_models(way.store, way.run, KeepModels(last=1, best=0))
    left_out = way.residual()["w"]
    missing = wanted - way.model()["w"]
    torch.testing.assert_close(missing, left_out.double(), rtol=0, atol=2e-5)  # 50 sums in fp32
    assert left_out.abs().max() > 1e-4
    if "topk" not in stages:
        steps = 127 if stages == "int8" else 7
        assert largest < 0.3 / steps  # half a step, where a block's largest change is near 0.25


def test_what_is_below_the_last_place_of_a_narrow_type_arrives_in_the_end(tmp_path, spec, quick):
    """bf16 tells 1 + 1/128 apart from 1, and nothing between; int4 beside a change of 1 tells sevenths."""
    start = {"w": torch.ones(64, dtype=torch.bfloat16)}
    way = Way(tmp_path, spec, "int4", start)
    wanted = start["w"].double()
    for number in range(1, 31):
        model = way.model()["w"]
        change = torch.full((64,), 2.0**-7, dtype=torch.bfloat16)
        change[0] = 1.0 if number % 2 else -1.0
        mean = model + change
        wanted += mean.double() - model.double()
        way.round(number, {"w": change})
    told = way.model()["w"].double()
    torch.testing.assert_close(told + way.residual()["w"], wanted, rtol=0, atol=1e-6)
    assert told[1:].min() > 1.1


def test_an_exact_codec_gives_the_mean_itself_and_leaves_nothing_out(tmp_path, spec):
    way = Way(tmp_path, spec, "zstd", initial())
    record = way.round(1, step(1))
    assert 0 < record.delta_bytes < record.model_bytes
    torch.testing.assert_close(way.model()["w"], initial()["w"] + step(1)["w"], rtol=0, atol=0)
    assert not way.store.spool.residual_folder("run").exists()


def test_of_a_model_that_comes_back_the_newest_change_is_told(tmp_path, spec):
    def by(number):
        return {"w": torch.full((900,), float(number)), "n": torch.tensor([0, 0])}

    way = Way(tmp_path, spec, "zstd", initial(size=900) | {"w": torch.zeros(900)})
    first, _, third = (way.round(number, by(step)) for number, step in ((1, 1), (2, 1), (3, -1)))
    drop_old_models(way.store, way.run, KeepModels(last=1, best=0))
    assert first.model_digest == third.model_digest
    delta = delta_to(way.store, way.run, third.model_digest)
    assert (delta.file.digest, delta.base_digest) == (third.delta_digest, third.base_digest)
    assert way.store.files.path(delta.file.digest).exists()


def test_without_a_codec_the_mean_is_the_model_and_there_is_no_change_to_tell(tmp_path, spec):
    way = Way(tmp_path, spec, "fp32", initial())
    record = way.round(1, step(1))
    assert record.delta_digest == ""
    assert delta_to(way.store, way.run, record.model_digest) is None


@pytest.mark.parametrize("stages", ["int8", ["topk", "zstd"]], ids=str)
def test_a_kill_anywhere_leaves_rounds_that_end_the_same(tmp_path, spec, stages, quick, monkeypatch):
    def rounds(way, numbers):
        for number in numbers:
            way.round(number, step(number, 900))
        return way

    start = initial(size=900)
    undisturbed = rounds(Way(tmp_path / "undisturbed", spec, stages, start), (1, 2, 3))
    kills = 0
    for at in itertools.count():
        way = rounds(Way(tmp_path / f"killed-{at}", spec, stages, start), (1,))
        with monkeypatch.context() as patch, Kill(patch, at) as kill:
            rounds(way, (2, 3))
        if not kill.happened:
            break
        kills += 1
        way.restart()
        rounds(way, (2, 3))
        assert way.run.model_digest == undisturbed.run.model_digest
        assert torch.equal(way.residual()["w"], undisturbed.residual()["w"])
        way.store.close()
    assert kills >= 2 * 7  # of a round: old residual, new one, change, model, both stored, transaction


class Kill:
    """Ends the coordinator before the rename or the transaction of the given number."""

    def __init__(self, patch, at):
        self.happened, self._left = False, at
        for owner, name in ((Path, "replace"), (Store, "save")):
            patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function):
        def counted(*arguments):
            if self._left == 0:
                self.happened = True
                raise Killed
            self._left -= 1
            return function(*arguments)

        return counted

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        return kind is Killed


def test_a_residual_that_is_gone_is_told_and_not_replaced_by_an_older_one(tmp_path, spec, quick, caplog):
    way = Way(tmp_path, spec, "int4", initial(size=900))
    for number in (1, 2):
        way.round(number, step(number, 900))
    (way.store.spool.residual_folder("run") / "pending.safetensors").unlink()
    mean = way.model()["w"] + step(3, 900)["w"]
    way.round(3, step(3, 900))
    assert "residual of the round before is gone" in caplog.text
    torch.testing.assert_close(mean - way.model()["w"], way.residual()["w"], rtol=0, atol=1e-6)


LARGE = {"w": np.linspace(-1, 1, 300_000, dtype=np.float32)}


async def test_sites_are_told_the_change_and_where_it_belongs(bench, spec):
    site = bench.site("a", step=0.5)
    queued = await bench.enqueue(spec(rounds=2, transport={"down": "int8"}), LARGE)
    run = await bench.ended(queued)
    assert run.state == "finished"
    by_model = {assignment.model.digest: assignment for assignment in site.asked}
    digests = [record.model_digest for record in bench.running.store.rounds(run.id)]
    assert digests[0] == queued.model_digest
    assert len(site.asked) == 5
    assert not by_model[digests[0]].HasField("delta")
    for base, model in itertools.pairwise(digests):
        delta = by_model[model].delta
        assert delta.base_digest == base
        assert delta.file.size_bytes < by_model[model].model.size_bytes / 3
        assert bench.running.store.files.path(delta.file.digest).stat().st_size == delta.file.size_bytes
    np.testing.assert_allclose(bench.model(run)["w"], LARGE["w"] + 1.0, atol=0.01)
    assert not bench.running.store.spool.residual_folder(run.id).exists()


async def test_a_stopped_run_keeps_what_was_left_out_for_its_resumption(bench, spec):
    bench.site("a")
    run = await bench.enqueue(spec(rounds=10_000, transport={"down": "int4"}))
    await bench.until(lambda: bench.running.store.run(run.id).rounds_done >= 2)
    await bench.running.runs.stop(run.id, "enough")
    assert list(bench.running.store.spool.residual_folder(run.id).iterdir())


async def test_a_change_is_kept_as_long_as_its_model(config, bench_of, spec):
    async with coordinator(config.model_copy(update={"keep_models": KeepModels(last=2, best=0)})) as running:
        bench = bench_of(running)
        bench.site("a")
        run = await bench.ended(await bench.enqueue(spec(rounds=5, transport={"down": "int8"})))
        rounds = {record.number: record for record in running.store.rounds(run.id)}
        kept = {path.name for path in (config.state_dir / "files").iterdir()}
        wanted = [rounds[number] for number in (4, 5)]
        names = {record.model_digest for record in wanted} | {record.delta_digest for record in wanted}
        names |= {asset["digest"] for asset in run.assets}
        assert kept == {name.replace(":", "-") for name in names}


async def test_a_change_that_two_runs_share_stays_as_long_as_one_of_them_keeps_it(config, bench_of, spec):
    async with coordinator(config.model_copy(update={"keep_models": KeepModels(last=2, best=0)})) as running:
        bench = bench_of(running)
        bench.site("a")
        first = await bench.ended(await bench.enqueue(spec(rounds=2, transport={"down": "int8"})))
        second = await bench.ended(await bench.enqueue(spec(rounds=3, transport={"down": "int8"})))
        shared, same = (running.store.rounds(run.id)[1].delta_digest for run in (first, second))
        assert shared == same
        assert running.store.files.path(shared).stat().st_size > 0


async def test_a_change_without_a_code_fails_the_run_with_the_tensor_and_the_way(bench, spec):
    bench.site("a", step=1e6)
    run = await bench.ended(await bench.enqueue(spec(transport={"down": "fp16"})))
    assert run.state == "failed"
    assert "transport.down cannot tell the model of round 1: tensor layer." in run.reason
    assert "beyond F16's range" in run.reason


async def test_an_update_larger_than_its_codec_can_make_it_is_refused_before_it_is_sent(bench, spec):
    site = bench.site("a")
    changes = {"cohort": {"attempts": 1}, "evaluation": {"initial": False}, "transport": {"up": "int8"}}
    run = await bench.waits(await bench.enqueue(spec(**changes), LARGE), "reported")
    state, reason = bench.outcomes(run)["a"]
    assert state == "rejected"
    assert re.search(r"the model has 12\d{5} and transport.up makes at most 3\d{5} of it", reason)
    assert not site.granted


@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_codec_that_gives_two_tensors_one_name_is_refused_at_submission(bench, spec, way):
    twice = {"w": np.ones(4, np.float32), "w.scale": np.ones(4, np.int64)}
    wanted = rf"transport.{way} cannot encode this model: .*two tensors the name w.scale"
    with pytest.raises(BadSpec, match=wanted):
        await bench.enqueue(spec(transport={way: "int8"}), twice)
    assert bench.running.store.runs() == []
    assert list((bench.running.store.spool.folder.parent / "files").iterdir()) == []


async def test_a_site_that_missed_its_receipt_is_told_that_its_update_counts(bench, spec):
    site = bench.site("a")
    run = await bench.ended(await bench.enqueue(spec()))
    name = f"{run.id}.1.1.train.a"
    await bench.detach("a")
    site.open_assignments = [name]
    bench.attach(site)
    await bench.until(lambda: name in site.cancelled)
    assert name in site.counted
