"""Rounds that train adapters: what sites come to compute with, against the sum that it should be."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bench import Bench
from safetensors.numpy import load_file, save_file

from fedloom_common.adapters.layout import Layout, Target
from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import decode_model
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.codecs.spec import Int8
from fedloom_common.errors import BadSpec
from fedloom_common.runspec import parse_run_spec
from fedloom_common.tensorfiles import TensorFile
from fedloom_server.adapters.parts import parts_of
from fedloom_server.adapters.residual import write_residual
from fedloom_server.adapters.updates import Given
from fedloom_server.aggregation import BaseModel, Update
from fedloom_server.app import coordinator
from fedloom_server.config import KeepModels
from fedloom_server.records import Round, Run
from fedloom_server.references import names_to

ALPHA = 8.0
SITES = {"a": 10, "b": 30, "c": 60}
SHAPES = {"one.weight": (24, 20), "two.weight": (20, 28)}
"""[outputs, inputs]; the second weight lies transposed in the model."""

Tensors = dict[str, np.ndarray]


class AdapterRun:
    """A run whose sites make random adapters, and by hand what these should come to."""

    def __init__(self, bench: Bench, merge: str, ranks: Mapping[str, int]) -> None:
        self.bench, self.merge, self.ranks = bench, merge, ranks
        self.sent: dict[tuple[str, int], Tensors] = {}
        random = np.random.default_rng(5)
        self.base = {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        self.base["two.weight"] = np.ascontiguousarray(self.base["two.weight"].T)
        rank = max(ranks.values())
        self.a = {f"{name}.A": random.normal(size=(rank, shape[1])) for name, shape in SHAPES.items()}
        self.b = {f"{name}.B": np.zeros((shape[0], rank)) for name, shape in SHAPES.items()}
        self.beside: Tensors = {}
        """What is trained whole beside the adapter, as a classifier's head."""

    async def begin(self, spec, **changes: object) -> Run:
        folder: Path = self.bench.folder / "adapter"
        folder.mkdir(parents=True)
        save_file(self.base, folder / "base.safetensors")
        if self.merge == "ffa":
            save_file(fp32(self.a), folder / "adapter_a.safetensors")
        trained = (self.b if self.merge == "ffa" else self.a | self.b) | self.beside
        save_file(fp32(trained), folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        targets = [
            {"weight": name, "a": f"{name}.A", "b": f"{name}.B", "is_transposed": name == "two.weight"}
            for name in SHAPES
        ]
        (folder / "adapter_layout.json").write_text(json.dumps({"alpha": ALPHA, "targets": targets}))
        adapter = {"rank": self.ranks["c"], "alpha": ALPHA, "merge": self.merge}
        if self.merge == "stack":
            adapter["ranks"] = dict(self.ranks)
        model = {"config": {"model_type": "gpt2"}, "adapter": adapter}
        changes = {"cohort": {"min_sites": len(SITES)}, "evaluation": {"initial": False}} | changes
        self.run = await self.bench.running.runs.submissions.enqueue(spec(model=model, **changes), folder)
        for name, examples in SITES.items():
            self.attach(name, examples)
        return self.run

    def attach(self, name: str, examples: int) -> None:
        site = self.bench.site(name, examples=examples)

        def learn(model: Tensors, number: int) -> Tensors:
            random = np.random.default_rng([ord(name), number])
            update = fp32({name: random.normal(size=tensor.shape) for name, tensor in model.items()})
            self.sent[name, number] = update
            return update

        site.learn = learn

    def record(self, number: int) -> Round:
        rounds = self.bench.running.store.rounds(self.run.id)
        return next(record for record in rounds if record.number == number)

    def folds(self, number: int) -> list[Tensors]:
        content = self.record(number).adapter if number else {}
        listed = (content or self.bench.running.store.run(self.run.id).adapter)["folds"]
        return [load_file(self.bench.running.store.files.path(fold["digest"])) for fold in listed]

    def frozen(self, number: int) -> Tensors:
        """The base after a round, with all folds in it."""
        weights = {name: weight.astype(float) for name, weight in self.base.items()}
        for fold in self.folds(number):
            for name in weights:
                if name in fold:
                    weights[name] = fold[name].astype(float)
                else:
                    left, right = fold[f"{name}/left"], fold[f"{name}/right"]
                    weights[name] = weights[name] + left.astype(float) @ right.astype(float)
        return weights

    def weights(self, number: int) -> Tensors:
        """What sites compute with after a round."""
        path = self.bench.running.store.files.path(self.record(number).model_digest)
        adapter = load_file(path)
        return {name: weight + self.product(adapter, name) for name, weight in self.frozen(number).items()}

    def exact(self, number: int) -> Tensors:
        """The weighted mean of what the sites computed with at the end of a round."""
        share = {site: examples / sum(SITES.values()) for site, examples in SITES.items()}
        return {
            name: weight + sum(share[site] * self.product(self.sent[site, number], name) for site in SITES)
            for name, weight in self.frozen(number - 1).items()
        }

    def product(self, adapter: Tensors, name: str) -> np.ndarray:
        """α/r · B·A  as it lies in the model."""
        a, b = ((fp32(self.a) | adapter)[f"{name}.{half}"].astype(float) for half in "AB")
        change = ALPHA / a.shape[0] * b @ a
        return change.T if name == "two.weight" else change


def fp32(tensors: Tensors) -> Tensors:
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def distance(came: Tensors, wanted: Tensors) -> float:
    """The largest difference, as a share of the largest value."""
    return max(float(abs(came[name] - wanted[name]).max() / abs(wanted[name]).max()) for name in wanted)


SAME = dict.fromkeys(SITES, 2)


@pytest.mark.parametrize(
    ("merge", "ranks"),
    [
        pytest.param("fedex", SAME, id="fedex"),
        pytest.param("ffa", SAME, id="ffa"),
        pytest.param("stack", SAME, id="stack"),
        pytest.param("stack", {"a": 1, "b": 4, "c": 2}, id="stack-of-different-ranks"),
    ],
)
async def test_an_exact_merge_is_the_mean_of_the_sites_weights_however_few_updates_may_lie_on_disk(
    config, spec, bench_of, merge, ranks
):
    async with coordinator(config.model_copy(update={"staged_updates": 1})) as running:
        adapters = AdapterRun(bench_of(running), merge, ranks)
        ended = await adapters.bench.ended(await adapters.begin(spec, rounds=3))
        assert ended.state == "finished", ended.reason
        for number in (1, 2, 3):
            assert distance(adapters.weights(number), adapters.exact(number)) < 1e-6
        sent = adapters.sent["a", 3]
        assert sent["one.weight.B"].shape == (24, ranks["a"])


@pytest.mark.parametrize("merge", ["fedit", "fedex", "ffa", "stack"])
async def test_what_is_trained_whole_beside_adapters_becomes_the_weighted_mean(spec, bench, merge):
    ranks = {"a": 1, "b": 4, "c": 2} if merge == "stack" else SAME
    adapters = AdapterRun(bench, merge, ranks)
    adapters.beside = {"score.weight": np.ones((3, 20))}
    await bench.ended(await adapters.begin(spec))
    head = load_file(bench.running.store.files.path(adapters.record(1).model_digest))["score.weight"]
    mean = sum(SITES[site] / 100 * adapters.sent[site, 1]["score.weight"].astype(float) for site in SITES)
    np.testing.assert_allclose(head, mean, rtol=1e-6, atol=1e-7)


async def test_plain_averages_of_a_and_b_are_not_the_mean_of_the_sites_weights(spec, bench):
    adapters = AdapterRun(bench, "fedit", SAME)
    await bench.ended(await adapters.begin(spec))
    assert adapters.folds(1) == []
    assert distance(adapters.weights(1), adapters.exact(1)) > 0.1
    path = bench.running.store.files.path(adapters.record(1).model_digest)
    share = {site: examples / 100 for site, examples in SITES.items()}
    mean = sum(share[site] * adapters.sent[site, 1]["one.weight.A"].astype(float) for site in SITES)
    np.testing.assert_allclose(load_file(path)["one.weight.A"], mean, rtol=1e-6)


async def test_factors_that_outgrow_the_weights_give_way_to_the_weights_themselves(spec, bench):
    adapters = AdapterRun(bench, "fedex", SAME)
    await bench.ended(await adapters.begin(spec, rounds=5))
    kinds = [[fold["name"] for fold in adapters.record(number).adapter["folds"]] for number in range(1, 6)]
    assert kinds[0] == ["factors.safetensors"]
    assert ["weights.safetensors"] in kinds
    assert ["weights.safetensors", "factors.safetensors"] in kinds
    assert distance(adapters.weights(5), adapters.exact(5)) < 1e-6


async def test_new_adapters_of_a_stack_change_nothing_and_differ_from_round_to_round(spec, bench):
    adapters = AdapterRun(bench, "stack", {"a": 1, "b": 4, "c": 2})
    await bench.ended(await adapters.begin(spec, rounds=2))
    paths = [bench.running.store.files.path(adapters.record(number).model_digest) for number in (1, 2)]
    first, second = (load_file(path) for path in paths)
    assert not first["one.weight.B"].any()
    assert abs(first["one.weight.A"]).max() <= 1 / np.sqrt(20)
    assert not np.array_equal(first["one.weight.A"], second["one.weight.A"])


async def test_a_site_is_told_the_frozen_files_and_folds_and_may_read_them_and_no_other_site_may(spec, bench):
    adapters = AdapterRun(bench, "fedex", SAME)
    await bench.ended(await adapters.begin(spec, rounds=2))
    first, second = [item for item in bench.sites["a"].asked if item.work == 1]
    assert [file.name for file in first.frozen] == ["base.safetensors"]
    assert (len(first.folds), len(second.folds)) == (0, 1)
    names = partial(names_to, bench.running.store.database)
    for file in (*first.frozen, *second.folds):
        assert names("a", file.digest)
        assert not names("stranger", file.digest)


async def test_a_coordinator_that_is_started_again_goes_on_with_the_folds(config, spec, bench_of):
    config = config.model_copy(update={"keep_models": KeepModels(last=10)})
    async with coordinator(config) as running:
        adapters = AdapterRun(bench_of(running), "fedex", SAME)
        run = await adapters.begin(spec, rounds=6)
        await adapters.bench.until(lambda: running.store.run(run.id).rounds_done >= 2)
        for name in SITES:
            await adapters.bench.detach(name)
    async with coordinator(config) as running:
        adapters.bench = bench_of(running)
        for name, examples in SITES.items():
            adapters.attach(name, examples)
        ended = await adapters.bench.ended(run)
        assert ended.rounds_done == 6
        for number in range(1, 7):
            assert distance(adapters.weights(number), adapters.exact(number)) < 1e-6


async def test_folds_are_kept_as_long_as_a_model_that_needs_them(config, spec, bench_of):
    config = config.model_copy(update={"keep_models": KeepModels(last=1, best=0)})
    async with coordinator(config) as running:
        adapters = AdapterRun(bench_of(running), "fedex", SAME)
        run = await adapters.bench.ended(await adapters.begin(spec, rounds=4))
        gone = {fold["digest"] for fold in adapters.record(2).adapter["folds"]}
        gone -= {fold["digest"] for fold in adapters.record(4).adapter["folds"]}
        assert gone
        assert not any(running.store.files.has(digest) for digest in gone)
        assert running.store.files.has(run.adapter["frozen"][0]["digest"])


async def test_a_clone_goes_on_from_a_round_with_its_folds(spec, bench):
    adapters = AdapterRun(bench, "fedex", SAME)
    run = await bench.ended(await adapters.begin(spec, rounds=2))
    frozen = adapters.frozen(1)
    clone = await bench.running.runs.submissions.clone_from_model(run.id, run.spec_json, 1)
    await bench.ended(clone)
    adapters.run = clone
    assert distance(adapters.frozen(0), frozen) == 0
    assert distance(adapters.frozen(0), adapters.base) > 0.01
    assert distance(adapters.weights(2), adapters.exact(2)) < 1e-6


async def test_no_two_rounds_of_a_stacking_clone_begin_with_the_same_adapter(spec, bench):
    adapters = AdapterRun(bench, "stack", SAME)
    run = await bench.ended(await adapters.begin(spec, rounds=2))
    clone = await bench.running.runs.submissions.clone_from_model(run.id, run.spec_json, 2)
    await bench.ended(clone)
    store = bench.running.store
    rounds = store.rounds(clone.id)
    initial = rounds[0].base_digest
    assert len({initial, *(record.model_digest for record in rounds)}) == 1 + 2
    assert parts_of(store, clone, initial).to_json() == store.run(clone.id).adapter


def test_encoded_updates_are_merged_as_what_they_decode_to(tmp_path):
    random, chain = np.random.default_rng(8), Chain((Int8(),))
    model = {"w.A": random.normal(size=(3, 40)), "w.B": random.normal(size=(50, 3))}
    save_file(fp32(model), tmp_path / "model")
    base, changes = BaseModel(path=tmp_path / "model", digest="blake3:0"), []
    updates = [Update(site=site, path=tmp_path / site, examples=examples) for site, examples in SITES.items()]
    for update in updates:
        trained = {name: tensor + random.normal(size=tensor.shape) for name, tensor in model.items()}
        save_file(fp32(trained), tmp_path / "trained")
        with TensorFile(tmp_path / "trained") as after, TensorFile(base.path) as before:
            encode_model(chain, trained=after, base=before, base_digest=base.digest, out=update.path)
            told = tmp_path / "told"
            decode_model(update.path, chain, base=before, base_digest=base.digest, out=told)
        changes.append({name: tensor.astype(float) for name, tensor in load_file(told).items()})
    layout = Layout(alpha=6.0, targets=(Target(weight="w", a="w.A", b="w.B", is_transposed=False),))
    given = Given(updates=updates, models=[base] * 3, stages=(Int8(),))
    assert write_residual(given, layout, tmp_path / "fold")
    fold = load_file(tmp_path / "fold")
    share = [update.examples / 100 for update in updates]
    mean = {name: sum(s * t[name] for s, t in zip(share, changes, strict=True)) for name in model}
    products = sum(s * t["w.B"] @ t["w.A"] for s, t in zip(share, changes, strict=True))
    wanted = 2 * (products - mean["w.B"] @ mean["w.A"])
    assert fold["w/left"].shape == (50, 2 * 3)
    np.testing.assert_allclose(fold["w/left"].astype(float) @ fold["w/right"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "adapter", "told"),
    [
        pytest.param({"mode": {"kind": "async", "buffer": 2}}, {}, "take merge ffa", id="async"),
        pytest.param({"cohort": {"late": "carry"}}, {}, "cohort.late is carry", id="late"),
        pytest.param({"transport": {"down": "int8"}}, {"merge": "stack"}, "transport.down", id="down"),
        pytest.param({"transport": {"up": "topk"}}, {"merge": "stack"}, "drop error_feedback", id="feedback"),
        pytest.param(
            {"aggregation": {"rule": "median"}, "cohort": {"min_sites": 3}}, {}, "rule is median", id="robust"
        ),
        pytest.param(
            {"local": {"steps": 1, "algorithm": "scaffold", "optimizer": {"name": "sgd"}}},
            {"merge": "stack"},
            "take plain or fedprox",
            id="scaffold",
        ),
        pytest.param(
            {"aggregation": {"server_optimizer": "fedadam"}},
            {},
            "server_optimizer is fedadam",
            id="optimizer",
        ),
        pytest.param({"aggregation": {"clip": {}}}, {}, "aggregation.clip is given", id="clip"),
        pytest.param({}, {"ranks": {"a": 4}}, "set merge to stack", id="ranks"),
        pytest.param({}, {"merge": "stack", "ranks": {"a": 0}}, "wanted 1 to 4096", id="no-rank"),
        pytest.param({}, {"target_modules": []}, "target_modules is empty", id="no-targets"),
    ],
)
def test_what_contradicts_an_adapter_is_refused_with_what_to_do(changes, adapter, told):
    spec = {
        "name": "tiny",
        "model": {"config": {"model_type": "gpt2"}, "adapter": adapter},
        "data": "text",
        "rounds": 1,
        "local": {"steps": 1},
    }
    with pytest.raises(BadSpec, match=told):
        parse_run_spec(json.dumps(spec | changes))
