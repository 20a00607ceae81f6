"""Sites of a run in this process: models as the coordinator makes them, trainings as sites do them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom_client.training.group import Group
from fedloom_client.training.orders import Job, Order, Source, WorkerResult
from fedloom_client.training.service import WarmRank
from fedloom_common.runspec import RunSpec
from fedloom_server.initialmodel import write_model

TINY = {
    "gpt2": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "llama": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    },
    "bert": {
        "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    },
    "t5": {
        "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)  # OpenMP's threads spin, and tests share their cores with other processes


class Run:
    """A run's initial model, and sites that train on it."""

    def __init__(self, folder: Path, spec: RunSpec) -> None:
        self.folder, self.spec, self.assets = folder, spec, folder / "assets"
        self.drawn = write_model(spec, self.assets)
        self.model = self.assets / "model.safetensors"

    def site(self, name: str, records: Sequence[Mapping[str, Any]], **source: Any) -> "Site":
        """A site with these records."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        fields = {"format": "jsonl", "files": (str(folder / "data.jsonl"),), "fields": {}, "held_out": 0.2}
        return Site(self, folder, Source(**fields | source))


class Site:
    """One site with one rank."""

    def __init__(self, run: Run, folder: Path, source: Source) -> None:
        self.run, self.folder, self.source = run, folder, source
        self._rank = WarmRank(Group(0, 1, torch.device("cpu"), None))

    def restarted(self) -> "Site":
        """The same site after a restart of its processes."""
        return Site(self.run, self.folder, self.source)

    def train(self, model: Path | None = None, round_: int = 1) -> WorkerResult:
        """One round."""
        return self._perform("train", model, round_)

    def evaluate(self, model: Path | None = None) -> WorkerResult:
        """Measure a model."""
        return self._perform("evaluate", model, 0)

    def order(self, work: Any, model: Path | None = None, round_: int = 1, update_path: str = "") -> Order:
        """What the daemon would ask for."""
        return Order(
            id=f"{work}-{round_}", work=work, run_id="run", round=round_,
            model_path=str(model or self.run.model), assets_dir=str(self.run.assets),
            spec=self.run.spec.model_dump(mode="json"), update_path=update_path,
        )  # fmt: skip

    def _perform(self, work: Any, model: Path | None, round_: int) -> WorkerResult:
        update = str(self.folder / f"update-{round_}.safetensors") if work == "train" else ""
        return self.perform(self.order(work, model, round_, update))

    def perform(self, order: Order) -> WorkerResult:
        """Any order."""
        packed = str(self.folder / "packed")
        job = Job(order=order, source=self.source, directory=str(self.folder), packed=packed)
        return self._rank.perform(job)


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    """Runs of a family of models, tiny and with the tokenizer of bytes."""

    def make(family: str, task: Mapping[str, Any], **spec: Any) -> Run:
        model = spec.pop("model", {"config": TINY[family] | NO_DROPOUT[family]})
        fields = {
            "name": "run", "model": model, "task": dict(task), "data": "texts", "rounds": 3, "seed": 3,
            "local": {"steps": 20, "batch_examples": 8, "optimizer": {"name": "adamw", "lr": 0.01}},
        } | spec  # fmt: skip
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        return Run(folder, RunSpec.model_validate(fields))

    return make
