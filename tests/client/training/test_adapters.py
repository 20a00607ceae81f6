"""Adapters at one site: what is trained, what lies under it, and what comes of it in an export."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from fedloom.v1.runs_pb2 import ExportResponse, Run
from fedloom.v1.session_pb2 import Blob
from fedloom_client.training.adapters import AdapterModel
from fedloom_client.training.orders import Order
from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import Lora, RunSpec
from fedloom_server.console.adapterfiles import make_files
from fedloom_server.initialadapter import write_adapter
from fedloom_server.initialmodel import write_model

RANK, ALPHA = 3, 6.0
TOKENS = torch.arange(40).reshape(2, 20)


class Adapter:
    """The files of an adapter's run, as its coordinator makes them."""

    @classmethod
    def of(cls, folder: Path, spec: RunSpec) -> "Adapter":
        """Those in a folder."""
        adapter = cls.__new__(cls)
        adapter.folder, adapter.spec = folder, spec
        return adapter

    def __init__(self, folder: Path, assets: Path, model: Path, adapter: dict[str, Any]) -> None:
        self.folder = folder
        self.adapter = {"rank": RANK, "alpha": ALPHA} | adapter
        shutil.copytree(assets, folder)
        shutil.copy(model, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = [
            {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[config["model_type"]]
        ]
        (folder / "config.json").write_text(json.dumps(config))
        self.spec = RunSpec.model_validate(
            {
                "name": "test",
                "model": {"config": {"model_type": config["model_type"]}, "adapter": self.adapter},
                "task": {"context_tokens": 32},
                "data": "texts",
                "rounds": 10,
                "local": {"steps": 4, "batch_examples": 8, "optimizer": {"lr": 0.05}},
            }
        )
        write_adapter(self.spec, folder)

    @property
    def frozen(self) -> dict[str, str]:
        names = ("base.safetensors", "adapter_a.safetensors")
        return {name: str(self.folder / name) for name in names if (self.folder / name).exists()}

    def order(self, make_order: Callable[..., Order], **changes: Any) -> Order:
        files = {"model_path": str(self.folder / "model.safetensors"), "assets_dir": str(self.folder)}
        return make_order(
            **{"frozen": self.frozen, "spec": self.spec.model_dump(mode="json")} | files | changes
        )

    def model(self, folds: tuple[str, ...] = (), adapter: Path | None = None) -> AdapterModel:
        path = adapter or self.folder / "model.safetensors"
        order = Order(
            id="x", work="evaluate", run_id="run", round=1, model_path=str(path),
            assets_dir=str(self.folder), spec={}, frozen=self.frozen,
        )  # fmt: skip
        assert self.spec.model.adapter is not None
        model = AdapterModel(self.spec.model.adapter, self.spec.task.model_class, order, torch.device("cpu"))
        model.fold(folds)
        model.load(path)
        model.module.eval()
        return model

    def random_adapter(self) -> Path:
        """A trained adapter: neither half is zero."""
        random = np.random.default_rng(3)
        tensors = load_file(self.folder / "model.safetensors")
        path = self.folder / "trained.safetensors"
        save_file({name: _random(random, tensor.shape) for name, tensor in tensors.items()}, path)
        return path

    def random_folds(self, count: int) -> tuple[str, ...]:
        random = np.random.default_rng(4)
        layout = json.loads((self.folder / "adapter_layout.json").read_text())
        base = load_file(self.folder / "base.safetensors")
        paths = []
        for number in range(count):
            tensors = {}
            for target in layout["targets"]:
                rows, columns = base[target["weight"]].shape
                tensors[f"{target['weight']}/left"] = _random(random, (rows, 5))
                tensors[f"{target['weight']}/right"] = _random(random, (5, columns))
            path = self.folder / f"fold-{number}"
            save_file(tensors, path)
            paths.append(str(path))
        return tuple(paths)

    def by_hand(self, folds: tuple[str, ...], adapter: Path) -> torch.nn.Module:
        """The model with folds and adapter in its weights, in float64."""
        weights = {
            name: tensor.astype(float) for name, tensor in load_file(self.folder / "base.safetensors").items()
        }
        layout = json.loads((self.folder / "adapter_layout.json").read_text())
        trained = load_file(adapter)
        if "adapter_a.safetensors" in self.frozen:
            trained |= load_file(self.folder / "adapter_a.safetensors")
        for target in layout["targets"]:
            name = target["weight"]
            for fold in map(load_file, folds):
                weights[name] += fold[f"{name}/left"].astype(float) @ fold[f"{name}/right"].astype(float)
            change = ALPHA / RANK * trained[target["b"]].astype(float) @ trained[target["a"]].astype(float)
            weights[name] += change.T if target["is_transposed"] else change
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder)).double()
        model.load_state_dict(
            {name: torch.from_numpy(array) for name, array in weights.items()}, strict=False
        )
        model.tie_weights()
        return model.eval()


def _random(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (0.2 * random.standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="session")
def llama(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Assets and weights of a Llama, whose output is not tied and whose linear layers are not transposed."""
    folder = tmp_path_factory.mktemp("llama") / "assets"
    shutil.copytree(assets, folder)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.manual_seed(1)
    weights = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    path = folder.with_name("model.safetensors")
    save_file({name: tensor.detach().numpy() for name, tensor in weights.items()}, path)
    return folder, path


@pytest.fixture
def make_adapter(
    assets: Path, global_model: Path, llama: tuple[Path, Path], tmp_path: Path
) -> Callable[..., Adapter]:
    def make(model_type: str = "gpt2", **adapter: Any) -> Adapter:
        files = (assets, global_model) if model_type == "gpt2" else llama
        return Adapter(tmp_path / "adapter", *files, adapter)

    return make


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("merge", ["fedex", "ffa"])
def test_a_site_computes_with_the_base_its_folds_and_the_adapter(make_adapter, model_type, merge):
    adapter = make_adapter(model_type, merge=merge, target_modules="all-linear")
    folds, trained = adapter.random_folds(2), adapter.random_adapter()
    with torch.no_grad():
        came = adapter.model(folds, trained).module(input_ids=TOKENS).logits
        wanted = adapter.by_hand(folds, trained)(input_ids=TOKENS).logits
        alone = adapter.model((), trained).module(input_ids=TOKENS).logits
    torch.testing.assert_close(came.double(), wanted, rtol=1e-4, atol=1e-5)
    assert abs(came - alone).max() > 0.1


def test_folds_that_come_one_by_one_or_all_at_once_or_again_give_the_same_bytes(make_adapter):
    adapter = make_adapter()
    folds = adapter.random_folds(3)
    warm, late = adapter.model(folds[:1]), adapter.model(folds)
    for number in (1, 2, 3):
        warm.fold(folds[:number])
    for name, tensor in late.module.state_dict().items():
        assert torch.equal(tensor, warm.module.state_dict()[name]), name
    weight = json.loads((adapter.folder / "adapter_layout.json").read_text())["targets"][0]["weight"]
    before = warm.module.state_dict()[weight.replace(".weight", ".base_layer.weight")].clone()
    whole = adapter.folder / "whole"
    save_file({weight: np.ones(before.shape, np.float32)}, whole)
    warm.fold((*folds, str(whole)))
    assert (warm.module.state_dict()[weight.replace(".weight", ".base_layer.weight")] == 1).all()
    warm.fold(folds)
    assert torch.equal(warm.module.state_dict()[weight.replace(".weight", ".base_layer.weight")], before)


@pytest.mark.parametrize("merge", ["fedex", "ffa", "stack"])
def test_only_the_adapter_is_trained_and_leaves_the_site(alone, make_adapter, make_order, merge):
    adapter = make_adapter(merge=merge)
    order = adapter.order(make_order)
    result = alone.perform(order)
    before, after = load_file(order.model_path), load_file(order.update_path)
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert any(".lora_A." in name for name in after) == (merge != "ffa")
    assert result.examples == 32
    kept = list((alone.directory).glob("optimizer-*"))
    assert bool(kept) == (merge != "stack")  # new adapters have no use for the old ones' moments
    later = adapter.order(make_order, work="evaluate", model_path=order.update_path)
    assert (
        alone.perform(later).metrics["loss"]
        < alone.perform(adapter.order(make_order, work="evaluate")).metrics["loss"]
    )


def test_a_base_in_bf16_is_the_folded_base_rounded_once(make_adapter):
    adapter = make_adapter(base_precision="bf16")
    folds = adapter.random_folds(2)
    exact, rounded = make_exact(adapter, folds), adapter.model(folds)
    rounded.fold(folds[:1])
    rounded.fold(folds)
    for name, tensor in rounded.module.state_dict().items():
        if ".lora_" in name:
            assert tensor.dtype == torch.float32
        elif name in exact:
            assert torch.equal(tensor, exact[name].bfloat16()), name
    assert torch.isfinite(rounded.module(input_ids=TOKENS).logits).all()


def make_exact(adapter: Adapter, folds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The state of the same model with its base in fp32."""
    exact = Adapter.of(adapter.folder, with_adapter(adapter.spec, base_precision="fp32"))
    return exact.model(folds).module.state_dict()


def with_adapter(spec: RunSpec, **changes: Any) -> RunSpec:
    assert spec.model.adapter is not None
    adapter = Lora(**spec.model.adapter.model_dump() | changes)
    return spec.model_copy(update={"model": spec.model.model_copy(update={"adapter": adapter})})


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantised_base_is_refused_on_the_cpu(make_adapter, precision):
    adapter = make_adapter(base_precision=precision)
    with pytest.raises(TrainingFailed, match=f"{precision}, which needs a CUDA device"):
        adapter.model()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks it
@pytest.mark.parametrize("merge", ["fedex", "ffa"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_an_export_computes_what_the_site_computes(make_adapter, tmp_path, model_type, merge):
    adapter = make_adapter(model_type, merge=merge)
    folds, trained = adapter.random_folds(2) if merge == "fedex" else (), adapter.random_adapter()
    site = adapter.model(folds, trained).module
    merged, alone = (
        export(adapter, folds, trained, tmp_path / kind, kind == "peft") for kind in ("whole", "peft")
    )
    with torch.no_grad():
        wanted = site(input_ids=TOKENS).logits
        whole = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
        assert whole.dtype == torch.float32
        torch.testing.assert_close(whole(input_ids=TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)
        published = tmp_path / "published"
        shutil.copytree(adapter.folder, published)
        shutil.copy(published / "base.safetensors", published / "model.safetensors")
        (published / "adapter_config.json").unlink()
        base = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
        with_adapter = PeftModel.from_pretrained(base, alone).eval()
        torch.testing.assert_close(with_adapter(input_ids=TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


def export(adapter: Adapter, folds: tuple[str, ...], trained: Path, to: Path, as_adapter: bool) -> Path:
    """The directory that ``fedloom run export`` makes of the coordinator's files."""
    names = ("adapter_config.json", "adapter_layout.json", "config.json", "tokenizer.json")
    places = {name: adapter.folder / name for name in names} | {"model.safetensors": trained}
    frozen = {name: Path(path) for name, path in adapter.frozen.items()}
    folded = {path: Path(path) for path in folds}
    answer = ExportResponse(
        files=[Blob(name=name) for name in places],
        frozen=[Blob(name=name) for name in frozen],
        folds=[Blob(name=name) for name in folded],
        run=Run(spec_json=adapter.spec.model_dump_json()),
    )
    to.mkdir()
    everything = places | frozen | folded
    made = make_files(
        answer, lambda blob: everything[blob.name], to, as_adapter=as_adapter, base_name="the/base"
    )
    for name, path in made.items():
        shutil.copy(path, to / name)
    if as_adapter:
        assert json.loads((to / "adapter_config.json").read_text())["base_model_name_or_path"] == "the/base"
    return to


def make_classifier(folder: Path, model_type: str, **adapter: Any) -> Adapter:
    config = TINY_CLASSIFIERS[model_type] | {"model_type": model_type}
    spec = RunSpec.model_validate({
        "name": "t", "data": "t", "rounds": 1, "local": {"steps": 1},
        "model": {"config": config, "adapter": {"rank": RANK} | adapter},
        "task": {"kind": "classification", "labels": ["bad", "good"], "context_tokens": 32},
    })  # fmt: skip
    write_model(spec, folder)
    return Adapter.of(folder, spec)


TINY_CLASSIFIERS = {
    "bert": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    },
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_classifiers_head_is_trained_whole_and_travels_and_is_exported(tmp_path):
    folder = tmp_path / "adapter"
    adapter = make_classifier(folder, "bert", target_modules="all-linear")
    trained, tokens = adapter.random_adapter(), TOKENS
    names = load_file(trained).keys()
    assert {name for name in names if "lora" not in name} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    site = adapter.model((), trained)
    assert {name for name, tensor in site.module.named_parameters() if tensor.requires_grad} == {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        if "lora" in name
        else name.removeprefix("base_model.model.")
        for name in names
    }
    merged = export(adapter, (), trained, tmp_path / "merged", as_adapter=False)
    alone = export(adapter, (), trained, tmp_path / "alone", as_adapter=True)
    shutil.copy(folder / "base.safetensors", folder / "model.safetensors")
    (folder / "adapter_config.json").unlink()
    with torch.no_grad():
        wanted = site.module(input_ids=tokens).logits
        whole = AutoModelForSequenceClassification.from_pretrained(merged).eval()
        torch.testing.assert_close(whole(input_ids=tokens).logits, wanted, rtol=1e-4, atol=1e-5)
        base = AutoModelForSequenceClassification.from_pretrained(folder)
        with_adapter = PeftModel.from_pretrained(base, alone).eval()
        torch.testing.assert_close(with_adapter(input_ids=tokens).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_a_classifiers_head_in_fp32_learns_upon_a_base_in_bf16(tmp_path, model_type):
    exact = make_classifier(tmp_path / "fp32", model_type).model()
    rounded = make_classifier(tmp_path / "bf16", model_type, base_precision="bf16").model()
    logits = rounded.module(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, exact.module(input_ids=TOKENS).logits, rtol=0.02, atol=0.02)
    logits.logsumexp(-1).sum().backward()
    heads = [tensor for name, tensor in rounded.trained.items() if "lora" not in name]
    assert heads
    assert all(tensor.dtype == torch.float32 and tensor.grad is not None for tensor in heads)


@pytest.mark.timeout(900)  # processes that load torch, on a machine that may be busy
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_a_share_of_the_frozen_base_each_do_what_one_process_does(
    alone, ranks, make_adapter, make_order, llama, tmp_path, world
):
    adapter = make_adapter(target_modules="all-linear")
    rounded = Adapter.of(adapter.folder, with_adapter(adapter.spec, base_precision="bf16"))
    half = Adapter(tmp_path / "ffa", *llama, {"merge": "ffa", "target_modules": "all-linear"})
    folds = adapter.random_folds(2)
    local = {"steps": 4, "batch_examples": 8, "accumulation_steps": 2, "clip_norm": 0.5}
    local["optimizer"] = {"name": "adamw", "lr": 1e-2, "eps": 1e-3}
    six = local | {"steps": 6}
    checkpoints = six | {"checkpoint_every": 2}
    later = {"kept": "rounds", "is_warm": True}

    def order(adapter: Adapter = adapter, local: dict[str, Any] = local, **changes: Any) -> dict[str, Any]:
        spec = adapter.spec.model_dump(mode="json")
        files = {"model_path": str(adapter.folder / "model.safetensors"), "assets_dir": str(adapter.folder)}
        return files | {"frozen": adapter.frozen, "spec": spec | {"local": spec["local"] | local}} | changes

    def expect(name: str, **changes: Any) -> float:
        alone.restart()
        path = str(tmp_path / f"alone-{name}.safetensors")
        return float(alone.perform(make_order(**{"update_path": path, "id": name} | changes)).metrics["loss"])

    ranks.add("first", kept="rounds", **order())
    ranks.add("second", **later, **order(round_=2, id="second", folds=folds[:1]))
    ranks.add("third", **later, **order(round_=3, id="third", folds=folds))
    ranks.add("recomputed", **order(local=local | {"gradient_checkpointing": True}))
    ranks.add("rounded", **order(rounded))
    ranks.add("half", **order(half))
    ranks.add("cut", **order(local=checkpoints), kept="checkpoint", cut_after=4, sharding="ddp")
    ranks.add("resumed", **order(local=checkpoints), kept="checkpoint")
    ranks.add("measured", **order(work="evaluate", update_path="", folds=folds))
    ranks.add("whole", sharding="ddp", **order())
    results = ranks.run(world)

    assert results[0]["first"]["loss"] == pytest.approx(expect("first", **order()), rel=1e-6)
    ranks.same("alone-first", "first")
    expect("second", **order(round_=2, folds=folds[:1]))
    ranks.same("alone-second", "second")
    expect("third", **order(round_=3, folds=folds))
    ranks.same("alone-third", "third")
    ranks.same("alone-first", "recomputed")
    expect("rounded", **order(rounded))
    ranks.same("alone-rounded", "rounded", tolerance=1e-3)
    expect("half", **order(half))
    ranks.same("alone-half", "half")
    expect("six", **order(local=six))
    ranks.same("alone-six", "resumed")
    measured = expect("measured", **order(work="evaluate", update_path="", folds=folds))
    assert results[0]["measured"]["loss"] == pytest.approx(measured, rel=1e-6)
    adapter_bytes = sum(array.nbytes for array in load_file(adapter.folder / "model.safetensors").values())
    for result in results:  # the adapter and its two moments lie whole on every rank
        shared, whole = (result[name]["held_bytes"] - 3 * adapter_bytes for name in ("first", "whole"))
        assert shared < (1 / world + 0.03) * whole


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantised_base_trains_near_the_exact_one(make_adapter, precision):
    adapter = make_adapter("llama", base_precision=precision, target_modules="all-linear")
    folds, trained = adapter.random_folds(1), adapter.random_adapter()
    order = Order(
        id="x", work="train", run_id="run", round=1, model_path=str(trained),
        assets_dir=str(adapter.folder), spec={}, frozen=adapter.frozen,
    )  # fmt: skip
    model = AdapterModel(adapter.spec.model.adapter, "AutoModelForCausalLM", order, torch.device("cuda"))
    model.fold(folds)
    model.load(trained)
    logits = model.module(input_ids=TOKENS.cuda()).logits
    wanted = adapter.by_hand(folds, trained)(input_ids=TOKENS).logits
    assert (logits.cpu().double() - wanted).norm() < 0.2 * wanted.norm()
    logits.sum().backward()
    assert all(tensor.grad is not None for tensor in model.tensors.values())
