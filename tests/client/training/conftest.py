"""A tiny model, its tokenizer and texts, as a coordinator and a site would have them."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedloom_client.config import DataSource
from fedloom_client.training.orders import Job, Order, Source, WorkerProgress, WorkerResult

WORDS = ("the", "sun", "moon", "sea", "wind", "rises", "falls", "over", "under", "green", "hill", "sleeps")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json of a GPT-2 with tied weights and no dropout, and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("assets")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    GPT2Config(
        vocab_size=257,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def global_model(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The initial global model: fp32, each storage once."""
    return write_global_model(assets, tmp_path_factory.mktemp("model") / "model.safetensors")


def write_global_model(assets: Path, path: Path, dtype: Any = None) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fedloom_common.tensors import write_tensors

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets), dtype=dtype or torch.float32)
    write_tensors(path, dict(model.named_parameters()))  # names a tied weight once
    return path


def sentences(characters: int, seed: int = 0) -> str:
    generator, lines = random.Random(seed), list[str]()
    while sum(map(len, lines)) < characters:
        lines.append(" ".join(generator.choices(WORDS, k=8)) + ".\n")
    return "".join(lines)[:characters]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """Two text files with 3,000 bytes each."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(2):
        (folder / f"{number}.txt").write_text(sentences(3000, seed=number))
    return DataSource(files=(str(folder / "*.txt"),))


@pytest.fixture
def make_order(assets: Path, global_model: Path, tmp_path: Path) -> Callable[..., Order]:
    """Orders of a run of 10 rounds; ``local`` and ``spec`` change the run spec, other keywords the order."""

    def make(
        work: str = "train", round_: int = 1, *, local: Any = None, spec: Any = None, **changes: Any
    ) -> Order:
        run_spec = {
            "name": "test",
            "model": {"config": {"model_type": "gpt2"}},
            "task": {"context_tokens": 32},
            "data": "texts",
            "rounds": 10,
            "local": {"steps": 4, "batch_examples": 8} | (local or {}),
            "seed": 3,
        } | (spec or {})
        fields: dict[str, Any] = {
            "id": f"{work}-{round_}",
            "work": work,
            "run_id": "run",
            "round": round_,
            "model_path": str(global_model),
            "assets_dir": str(assets),
            "spec": run_spec,
            "update_path": str(tmp_path / f"update-{round_}.safetensors") if work == "train" else "",
        }
        return Order(**(fields | changes))

    return make


@pytest.fixture
def alone(texts: DataSource, tmp_path: Path) -> "Alone":
    """One rank in the test's own process, on the two text files."""
    return Alone(texts, tmp_path / "run")


class Alone:
    def __init__(self, source: DataSource, directory: Path) -> None:
        self.source, self.directory = source, directory
        self.progress: list[WorkerProgress] = []
        self.stop_wanted = False
        self.restart()

    def restart(self) -> None:
        """Forget all that a process keeps warm."""
        import torch

        from fedloom_client.training.group import Group
        from fedloom_client.training.service import WarmRank

        torch.set_num_threads(1)  # OpenMP's threads spin, and tests share their cores with other processes
        group = Group(0, 1, torch.device("cpu"), None)
        self._rank = WarmRank(group, self.progress.append, lambda: self.stop_wanted)

    def perform(self, order: Order) -> WorkerResult:
        source = Source(**self.source.model_dump())
        packed = str(self.directory / "data")
        return self._rank.perform(
            Job(order=order, source=source, directory=str(self.directory), packed=packed)
        )


@pytest.fixture
def ranks(texts: DataSource, make_order: Callable[..., Order], tmp_path: Path) -> "Ranks":
    """Several ranks in processes of their own, on the two text files."""
    return Ranks(texts, make_order, tmp_path)


class Ranks:
    """Lists of jobs for ranks, done by processes, and for one process, as what they must equal."""

    def __init__(self, texts: DataSource, make_order: Callable[..., Order], folder: Path) -> None:
        self._source, self._make_order, self._folder = Source(**texts.model_dump()), make_order, folder
        self._jobs: dict[str, Any] = {}

    def add(
        self,
        name: str,
        *,
        kept: str = "",
        sharding: str = "fsdp",
        cut_after: int | None = None,
        is_warm: bool = False,
        **changes: Any,
    ) -> None:
        """A job; those with the same ``kept`` share a run's folder, and a warm one the last one's process."""
        changes = {"id": kept or name, "update_path": str(self._folder / f"{name}.safetensors")} | changes
        order = self._make_order(**changes)
        job = Job(
            order=order, source=self._source, directory=str(self._folder / (kept or name)),
            packed=str(self._folder / "data"), sharding=sharding,  # type: ignore[arg-type]
        )  # fmt: skip
        self._jobs[name] = {"job": asdict(job), "cut_after": cut_after, "is_warm": is_warm}

    def run(self, world: int, device: str = "cpu") -> list[dict[str, Any]]:
        """Do them; by rank, what came of each."""
        jobs = self._folder / f"jobs-{world}-{len(list(self._folder.glob('jobs-*.json')))}.json"
        jobs.write_text(json.dumps(self._jobs))
        self._jobs = {}
        command = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
        with jobs.with_suffix(".log").open("w") as log:
            processes = [
                subprocess.Popen([*command, str(rank), str(world), str(jobs), device], stderr=log)
                for rank in range(world)
            ]
            statuses = [process.wait(800) for process in processes]
        assert statuses == [0] * world, jobs.with_suffix(".log").read_text()[-4000:]
        return [json.loads(jobs.with_suffix(f".{rank}").read_text()) for rank in range(world)]

    def same(self, one: str, other: str, tolerance: float = 2e-6) -> None:
        import torch
        from safetensors.torch import load_file

        first, second = (load_file(self._folder / f"{name}.safetensors") for name in (one, other))
        assert list(first) == list(second)
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, atol=tolerance, rtol=0, msg=name)
