"""A rank of benchmarks/training.py with one of the trainers; it takes a turn, of some steps, when told to.

    python trainer_rank.py TASK TRAINER

TASK is a JSON file with the fields of ``Task``. A line on standard input asks for a turn; a line that begins
with "turn " tells the seconds, and the process's CPU seconds, that its steps took.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments

from fedloom_client.training.group import Group
from fedloom_client.training.orders import Job, Order, Source, WorkerProgress
from fedloom_client.training.service import WarmRank
from fedloom_common.memory import keep_memory_between_steps

CLIP_NORM, RATE = 1.0, 5e-4


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the ranks are told."""

    assets: str
    model: str
    text: str
    scratch: str
    spec: dict[str, Any]
    steps: int
    """Optimizer steps in a turn."""
    turns: int
    """Turns of each that count; one more comes before them."""
    threads: int
    device: str

    @property
    def precision(self) -> torch.dtype:
        """Of autocast: bf16 on a GPU, as fedloom chooses by itself."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def main() -> None:
    """Take turns until nobody asks for more."""
    path, name = Path(sys.argv[1]), sys.argv[2]
    task = Task(**json.loads(path.read_text()))
    torch.set_num_threads(task.threads)
    group = _join(path.with_suffix(f".{name}"), task)
    clock = Clock(task)
    is_asked()  # there is what to begin with
    if name == "fedloom":
        keep_memory_between_steps()  # as a site's ranks do
        Ours(task, group, clock).serve()
    elif name == "plain":
        Plain(task, group, clock).serve()
    else:
        _serve_peer(task, group, clock)
    group.leave()


@dataclass
class Clock:
    """Times turns."""

    task: Task
    _began: tuple[float, float] = (0.0, 0.0)
    _taken: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        """The first step begins."""
        self._began = self._now()

    def end(self) -> None:
        """The last step is done."""
        now = self._now()
        self._taken = now[0] - self._began[0], now[1] - self._began[1]

    def tell(self) -> None:
        """Nothing of this turn is under way any more."""
        print("turn", *self._taken, flush=True)

    def _now(self) -> tuple[float, float]:
        if self.task.device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic(), time.process_time()


def is_asked() -> bool:
    """Wait until a turn is asked for; False if none is any more."""
    return bool(sys.stdin.readline())


class Ours:
    """fedloom's trainer as a site runs it; a turn is a round, of which the steps are timed."""

    def __init__(self, task: Task, group: Group, clock: Clock) -> None:
        self._task, self._clock, self._round = task, clock, 0
        self._warm = WarmRank(group, self._hear)

    def serve(self) -> None:
        """A round a turn."""
        while is_asked():
            self._turn()
            self._clock.tell()

    def _turn(self) -> None:
        self._round += 1
        order = Order(
            id=str(self._round), work="train", run_id="run", round=self._round, model_path=self._task.model,
            assets_dir=self._task.assets, spec=self._task.spec,
            update_path=str(Path(self._task.scratch) / "update.safetensors"),
        )  # fmt: skip
        source = Source(format="text", files=(self._task.text,), fields={"text": "text"}, held_out=0.01)
        job = Job(
            order=order, source=source, directory=self._task.scratch, packed=f"{self._task.scratch}/packed"
        )
        self._warm.perform(job)

    def _hear(self, progress: WorkerProgress) -> None:
        """The loop tells of its begin and its end."""
        if progress.phase == "train" and progress.done == 0:
            self._clock.begin()
        elif progress.phase == "train" and progress.done == progress.total:
            self._clock.end()


class Plain:
    """A loop as one would write it for this model: DDP, fused AdamW, clipping, a cosine schedule."""

    def __init__(self, task: Task, group: Group, clock: Clock) -> None:
        self._task, self._clock, self._device = task, clock, group.device
        module = _model(task).to(group.device)
        self._model: nn.Module = module
        if group.world > 1:
            self._model = DistributedDataParallel(module, gradient_as_bucket_view=True)
        self._optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=0.01, fused=True)
        steps = task.steps * (task.turns + 1)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)
        blocks = _blocks(task)
        sampler: Any = DistributedSampler(blocks, group.world, group.rank)  # type: ignore[arg-type]
        share = task.spec["local"]["batch_examples"] // group.world
        self._loader = DataLoader(
            blocks, share, sampler=sampler, drop_last=True, pin_memory=task.device == "cuda"
        )
        self._batches = self._endless()

    def serve(self) -> None:
        """Some steps a turn."""
        while is_asked():
            self._clock.begin()
            self._model.train()
            for _ in range(self._task.steps):
                self._step(next(self._batches).to(self._device, non_blocking=True))
            self._clock.end()
            self._clock.tell()

    def _step(self, examples: torch.Tensor) -> None:
        enabled = self._task.precision != torch.float32
        with torch.autocast(self._device.type, self._task.precision, enabled=enabled):
            loss = self._model(input_ids=examples, labels=examples, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()

    def _endless(self) -> Iterator[torch.Tensor]:
        while True:
            yield from self._loader


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Examples as Hugging Face's Trainer takes them."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._blocks[number], "labels": self._blocks[number]}


class Turns(TrainerCallback):  # type: ignore[misc]
    """Holds the Trainer's loop until a turn is asked for."""

    def __init__(self, task: Task, clock: Clock) -> None:
        self._task, self._clock = task, clock

    def on_train_begin(self, _: Any, __: Any, control: Any, **___: Any) -> None:
        """Before the first turn."""
        self._await(control)

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        """A turn ends with its last step."""
        if state.global_step % self._task.steps == 0:
            self._clock.end()
            self._clock.tell()
            self._await(control)

    def _await(self, control: Any) -> None:
        control.should_training_stop = not is_asked()
        self._clock.begin()


def _serve_peer(task: Task, group: Group, clock: Clock) -> None:
    arguments = TrainingArguments(
        output_dir=f"{task.scratch}/peer", max_steps=task.steps * (task.turns + 2), learning_rate=RATE,
        per_device_train_batch_size=task.spec["local"]["batch_examples"] // group.world, weight_decay=0.01,
        lr_scheduler_type="cosine", max_grad_norm=CLIP_NORM, optim="adamw_torch_fused", logging_steps=10**6,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=task.device == "cpu",
        bf16=task.device == "cuda", ddp_find_unused_parameters=False, seed=1,
    )  # fmt: skip
    trainer = transformers.Trainer(
        _model(task), arguments, train_dataset=Blocks(_blocks(task)), callbacks=[Turns(task, clock)]
    )
    trainer.train()


def _model(task: Task) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(task.assets))


def _blocks(task: Task) -> torch.Tensor:
    """The examples that fedloom packed: [examples, tokens]."""
    packed = next(Path(task.scratch).glob("packed/*/train/input_ids.bin"))
    context = task.spec["task"]["context_tokens"]
    tokens = torch.from_numpy(np.fromfile(packed, np.uint16).astype(np.int64))
    return tokens[: len(tokens) // context * context].reshape(-1, context)


def _join(meeting: Path, task: Task) -> Group:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if task.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if world == 1:
        return Group(0, 1, device, None)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = distributed.FileStore(str(meeting), world)
    prefixed = distributed.PrefixStore("group", store)
    waits = timedelta(minutes=30)  # for the others' turns
    distributed.init_process_group(backend, store=prefixed, rank=rank, world_size=world, timeout=waits)
    return Group(rank, world, device, store)


if __name__ == "__main__":
    main()
