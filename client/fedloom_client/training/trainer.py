"""What a rank keeps warm from order to order of a run: the model, the packed data, the optimizer."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedloom_client.training import loop
from fedloom_client.training.algorithms import PlainRound, begin_round
from fedloom_client.training.alone import better, is_measured_after, told_on
from fedloom_client.training.checkpoints import Checkpoint
from fedloom_client.training.controls import SiteControls
from fedloom_client.training.data import PackedData
from fedloom_client.training.examples import spread
from fedloom_client.training.group import Group
from fedloom_client.training.measuring import NothingToMeasure, evaluate
from fedloom_client.training.models import LocalModel
from fedloom_client.training.optimizers import KeptState, new_optimizer, rate_sum
from fedloom_client.training.orders import Job, Order, WorkerProgress, WorkerResult
from fedloom_client.training.parallel import autocast_type, compute_activations_again, distributed
from fedloom_client.training.plan import ExampleStream, RoundPlan, plan_round
from fedloom_client.training.ranks import Rank
from fedloom_client.training.roundalgorithm import Left, RoundStart
from fedloom_client.training.sharding import shard
from fedloom_client.training.tasks import new_task
from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import RunSpec


class Trainer:
    """Does the orders of one run on one rank."""

    def __init__(
        self,
        job: Job,
        data: PackedData,
        group: Group,
        report: Callable[[WorkerProgress], None],
        stop_wanted: Callable[[], bool],
    ) -> None:
        """Build the model.

        Raises:
            TrainingFailed, BadTensor: the model's files are unfit, or do not fit the data.
        """
        self._spec = RunSpec.model_validate(job.order.spec)
        self._group, self._data, assets = group, data, Path(job.order.assets_dir)
        self._model = _open_model(self._spec, job, group)
        if self._spec.local.gradient_checkpointing:
            compute_activations_again(self._model.module)
        self._rank = Rank(
            group=group,
            model=self._model.module,
            task=new_task(self._spec.task, assets),
            seed=self._spec.seed,
            precision=autocast_type(self._spec.local, group.device),
            report=report,
            stop_wanted=stop_wanted,
        )
        self._check_tokens()
        self._stream: ExampleStream | None = None
        self._directory = Path(job.directory)
        self._kept = KeptState(self._directory)
        self._controls = SiteControls(self._directory)
        self._optimizer: torch.optim.Optimizer | None = None
        self._optimizer_round = 0
        self._warm_for = warm_key(job)

    def fits(self, job: Job) -> bool:
        """Whether the job is of the run that this trainer was made for."""
        return warm_key(job) == self._warm_for

    def perform(self, order: Order) -> WorkerResult:
        """Do an order.

        Raises:
            Cancelled: the daemon no longer wants it.
            TrainingFailed, BadTensor: it cannot be done; another order may.
        """
        started = time.monotonic()
        self._model.fold(order.folds)
        self._model.load(Path(order.model_path))
        if order.work == "evaluate":
            return replace(self._evaluate(), phase_seconds={"evaluate": time.monotonic() - started})
        before = self._evaluate_if_possible() if order.measures else None
        measured = time.monotonic()
        result = self._train_alone(order) if order.work == "alone" else self._train(order)
        seconds = {"train": time.monotonic() - (started if before is None else measured)}
        if before is not None:
            seconds["evaluate"] = measured - started
        return replace(result, phase_seconds=seconds, before=before, data_examples=len(self._data.train))

    def _evaluate_if_possible(self) -> WorkerResult | None:
        """A site that has nothing to measure on trains all the same."""
        try:
            return self._evaluate()
        except NothingToMeasure:
            return None

    def _train(self, order: Order) -> WorkerResult:
        local, group, data = self._spec.local, self._group, self._data.train
        plan = plan_round(
            local, round=order.round, rounds=self._spec.rounds, train_examples=len(data), world=group.world,
            schedule_round=order.schedule_round,
        )  # fmt: skip
        if self._stream is None:
            self._stream = ExampleStream(len(data), seed=self._spec.seed, rank=group.rank, world=group.world)
        loss, optimizer = self._loss, self._take_optimizer(order.round)
        algorithm = begin_round(local.algorithm, self._start_of(order, plan))
        checkpoint = Checkpoint(self._directory, order.id, local.checkpoint_every, group, self._seeder(order))
        course = loop.Course(
            plan=plan,
            loss=loss,
            stream=self._stream,
            optimizer=optimizer,
            algorithm=algorithm,
            checkpoint=checkpoint,
            earlier=checkpoint.begin(self._model, optimizer),
        )
        trained = loop.train(self._rank, local, data, course)
        left = algorithm.end()
        self._save(order, optimizer, left)
        if self._spec.keeps_optimizer_state:
            self._optimizer, self._optimizer_round = optimizer, order.round
        return WorkerResult(
            examples=plan.steps * plan.step_examples,
            tokens=trained.targets,
            metrics={"loss": trained.loss},
            update_path=order.update_path,
        )

    def _train_alone(self, order: Order) -> WorkerResult:
        """Take the steps of so many rounds in one go; the best of what is measured on the way.

        Nothing of the run is touched: the optimizer is a new one, and none is kept.
        """
        spec, group, data, rounds = self._spec, self._group, self._data.train, order.alone_rounds
        self._optimizer = None
        optimizer = new_optimizer(spec.local.optimizer, self._model.module)
        stream = ExampleStream(len(data), seed=spec.seed, rank=group.rank, world=group.world)
        best: WorkerResult | None = None
        for round_ in range(1, rounds + 1):
            plan = plan_round(
                spec.local, round=round_, rounds=rounds, train_examples=len(data), world=group.world
            )
            loss = self._loss
            if round_ > 1 and not spec.keeps_optimizer_state:
                optimizer = new_optimizer(spec.local.optimizer, self._model.module)
            seed = self._seeder(replace(order, round=round_))
            checkpoint = Checkpoint(self._directory, order.id, None, group, seed)
            course = loop.Course(
                plan=plan, loss=loss, stream=stream, optimizer=optimizer, algorithm=PlainRound(),
                checkpoint=checkpoint, earlier=checkpoint.begin(self._model, optimizer),
            )  # fmt: skip
            report = told_on(self._rank.report, plan.first_step, plan.total_steps)
            loop.train(replace(self._rank, report=report), spec.local, data, course)
            if is_measured_after(spec, round_, rounds):
                best = better(spec, best, self._evaluate())
        assert best is not None, "the last round is measured"
        return best

    @cached_property
    def _loss(self) -> nn.Module:
        """Made by the first training, ahead of the checkpoint, which seeds: the making may draw dropout."""
        return distributed(self._rank, self._data.train)

    def _evaluate(self) -> WorkerResult:
        data = self._data.held_out
        numbers = spread(len(data), self._spec.evaluation.max_examples)
        if not len(numbers):
            raise NothingToMeasure(
                "the site's held-out data are too small for one example: add some, raise the data set's "
                "held_out, or lower context_tokens where texts are cut to it"
            )
        local = self._spec.local
        micro_examples = max(1, local.batch_examples // (self._group.world * local.accumulation_steps))
        measured, targets = evaluate(self._rank, self._model.module, data, numbers, micro_examples)
        packed = self._data.packed
        lost = {"shortened_share": packed.shortened / packed.records} if packed.records else {}
        return WorkerResult(
            examples=len(numbers),
            tokens=targets,
            metrics=measured.metrics | lost,
            weights=measured.weights | dict.fromkeys(lost, packed.records),
            counts=measured.counts,
        )

    def _take_optimizer(self, round_: int) -> torch.optim.Optimizer:
        """The optimizer for a round; until the round is done, nobody has one to go wrong with."""
        optimizer, self._optimizer = self._optimizer, None
        if optimizer is not None and self._optimizer_round < round_:
            return optimizer
        optimizer = new_optimizer(self._spec.local.optimizer, self._model.module)
        if self._spec.keeps_optimizer_state:
            self._kept.load(optimizer, self._model.module, round_)
        return optimizer

    def _seeder(self, order: Order) -> Callable[[int], None]:
        """Seeds this rank for a step of an order."""

        def seed(step: int) -> None:
            later = (step,) if step else ()
            torch.manual_seed(_seed(self._spec.seed, order.round, self._group.rank, *later))

        return seed

    def _start_of(self, order: Order, plan: RoundPlan) -> RoundStart:
        return RoundStart(
            trained=self._model.trained,
            global_model=Path(order.model_path),
            rate_sum=rate_sum(self._spec.local, plan),
            controls=self._controls,
        )

    def _save(self, order: Order, optimizer: torch.optim.Optimizer, left: Left) -> None:
        try:
            self._model.write(Path(order.update_path), left.in_update, self._group)
            if left.at_site:
                self._controls.prepare(left.at_site, order, self._group)
            if self._spec.keeps_optimizer_state:
                self._kept.save(optimizer, self._model.module, order.round, self._group)
        except TrainingFailed as error:
            raise TrainingFailed(f"the site cannot write what it trained: {error}") from error

    def _check_tokens(self) -> None:
        module: Any = self._model.module
        known = module.get_input_embeddings().num_embeddings
        task, packed = self._rank.task, self._data.packed
        largest = max(max(packed.largest[name], task.padding.get(name, 0)) for name in task.token_fields)
        if largest >= known:
            raise TrainingFailed(
                f"the tokenizer makes token {largest}, but the model has only {known} "
                "tokens: give the run a model and a tokenizer that belong together"
            )
        wanted, most = self._spec.task.longest, getattr(module.config, "max_position_embeddings", None)
        if most is not None and 0 <= most < wanted:  # XLNet says -1 for as many as one likes
            raise TrainingFailed(f"the task reads {wanted} tokens at once, but the model at most {most}")


def _open_model(spec: RunSpec, job: Job, group: Group) -> LocalModel:
    order, model_class, adapter = job.order, spec.task.model_class, spec.model.adapter
    lay = None
    if job.sharding == "fsdp" and group.world > 1:
        lay = partial(shard, group=group, cuts_trained=adapter is None)
    if adapter is None:
        return LocalModel(Path(order.assets_dir), Path(order.model_path), group.device, model_class, lay)
    from fedloom_client.training.adapters import AdapterModel  # here: peft takes seconds to load

    return AdapterModel(adapter, model_class, order, group.device, lay)


def warm_key(job: Job) -> tuple[object, ...]:
    """Everything of a job that a warm trainer depends on."""
    return job.order.run_id, job.order.spec, job.order.assets_dir, job.source, job.directory, job.sharding


def _seed(*parts: int) -> int:
    """A generator seed that differs for every run seed, round, rank and step."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
