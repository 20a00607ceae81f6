"""Doing one assignment: may we, fetch what it needs, let the worker group do it, keep the result."""

import asyncio
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedloom_client.assets import model_type
from fedloom_client.cache import Cache, OnProgress, require_space, size_bytes
from fedloom_client.config import SiteConfig
from fedloom_client.consent import Consent
from fedloom_client.frozen import Frozen, FrozenFiles
from fedloom_client.groups import WarmGroups
from fedloom_client.messages import Answer, Assignment, Failure, Measurement, Outcome, Progress, Refusal
from fedloom_client.outbox import Outbox
from fedloom_client.residuals import Residuals
from fedloom_client.signs import signs_of_life
from fedloom_client.training.orders import SPARE_UPDATE, Order, WorkerProgress, WorkerResult
from fedloom_common.codecs.spec import AS_IS
from fedloom_common.errors import FederationError, TrainingFailed
from fedloom_common.runspec import AdamW, Local, RunSpec, Scaffold, read_run_spec

DEADLINE_GRACE_S = 10.0  # the coordinator's Cancel comes first; this ends work whose coordinator is gone

logger = logging.getLogger(__name__)

Report = Callable[[Progress], None]


class Performer:
    """Turns assignments into answers."""

    def __init__(
        self,
        config: SiteConfig,
        consent: Consent,
        *,
        cache: Cache,
        outbox: Outbox,
        residuals: Residuals,
        groups: WarmGroups,
        frozen: Frozen,
    ) -> None:
        self._config = config
        self._consent = consent
        self._cache = cache
        self._outbox = outbox
        self._residuals = residuals
        self._groups = groups
        self._frozen = frozen

    async def answer(self, assignment: Assignment, deadline_at_s: float | None, report: Report) -> Answer:
        """Do an assignment; whatever goes wrong becomes its answer.

        A finished training is in the outbox before this returns. ``deadline_at_s`` is a time of the
        event loop's clock.
        """
        end_s = None if deadline_at_s is None else deadline_at_s + DEADLINE_GRACE_S
        try:
            async with asyncio.timeout_at(end_s):
                with self._cache.keeping(assignment.model.digest), self._frozen.keeping(assignment.frozen):
                    answer = await self._do(assignment, report)
        except asyncio.CancelledError:
            if assignment.id not in self._outbox.aside():
                self._clear(assignment)
            raise
        except TimeoutError as error:
            late = f"not done by the deadline of {assignment.deadline_s:g} s"
            answer = Failure(assignment_id=assignment.id, reason=str(error) or late)
        except TrainingFailed as error:  # the words of whoever failed may quote a record
            answer = self._failure(assignment, self._explain(error))
        except (FederationError, OSError) as error:
            answer = Failure(assignment_id=assignment.id, reason=self._explain(error))
        except Exception as error:  # the daemon outlives any assignment, and the operator hears why
            logger.exception("an assignment failed in a way that fedloom does not know")
            answer = self._failure(
                assignment, f"a {type(error).__name__} that fedloom does not know\n{error}"
            )
        self._clear(assignment)
        return answer

    def _clear(self, assignment: Assignment) -> None:
        """Keep nothing of a training that is not finished."""
        if self._outbox.get(assignment.id) is None:
            self._outbox.remove(assignment.id)
            self._residuals.discard(assignment.run_id, assignment.id)

    async def _do(self, assignment: Assignment, report: Report) -> Answer:
        spec = read_run_spec(assignment.spec_json)
        if aside := self._outbox.aside().get(assignment.id):
            logger.info("a training that was put aside goes on", extra={"assignment": assignment.id})
            model = await self._model(assignment, spec, report)
            return await self._keep(assignment, spec, model, aside.path, aside.outcome, report)
        if reason := self._consent.refusal(assignment, spec):
            return Refusal(assignment_id=assignment.id, reason=reason)
        began_s = time.monotonic()
        report(Progress(assignment_id=assignment.id, phase="download", total=assignment.model.size_bytes))
        assets = await self._cache.assets(assignment.assets)
        if reason := self._consent.refusal_of_family(model_type(assets)):
            return Refusal(assignment_id=assignment.id, reason=reason)
        model = await self._model(assignment, spec, report)
        under = await self._frozen.bring(assignment, _report_download(assignment, report))
        download_s = time.monotonic() - began_s
        trained = self._place(assignment, spec, model) if assignment.work == "train" else None
        result = await self._perform(
            assignment, spec, model=model, assets=assets, under=under, trained=trained, report=report
        )
        outcome = Outcome(
            assignment_id=assignment.id,
            examples=result.examples,
            tokens=result.tokens,
            metrics=result.metrics,
            weights=result.weights,
            counts=result.counts,
            phase_seconds={"download": download_s, **result.phase_seconds},
            before=_measured_before(result),
            data_examples=result.data_examples,
        )
        if trained is None:
            return outcome
        return await self._keep(assignment, spec, model, trained, outcome, report)

    async def _model(self, assignment: Assignment, spec: RunSpec, report: Report) -> Path:
        return await self._cache.model(
            assignment.model,
            _report_download(assignment, report),
            delta=assignment.delta,
            stages=spec.transport.down,
        )

    def _place(self, assignment: Assignment, spec: RunSpec, model: Path) -> Path:
        """Where training is to write its model, on a disk with room for all that comes of it."""
        path = self._outbox.place_for(assignment.id)
        wanted_bytes = assignment.model.size_bytes - size_bytes(path.with_name(SPARE_UPDATE))
        wanted_bytes += _checkpoint_bytes(spec.local, assignment.model.size_bytes)
        if isinstance(spec.local.algorithm, Scaffold):
            wanted_bytes += assignment.model.size_bytes  # half of it is c; the site's own take two files
        if spec.transport.up == AS_IS:
            require_space(path.parent, wanted_bytes, "the update")
            return path
        from fedloom_client.uplink import encoding_bytes

        wanted_bytes += encoding_bytes(spec, model)
        require_space(path.parent, wanted_bytes, "the trained model, the update and what it leaves out")
        return path.with_name("trained.safetensors")

    async def _perform(
        self,
        assignment: Assignment,
        spec: RunSpec,
        *,
        model: Path,
        assets: Path,
        under: FrozenFiles,
        trained: Path | None,
        report: Report,
    ) -> WorkerResult:
        order = Order(
            id=assignment.id,
            work=assignment.work,
            run_id=assignment.run_id,
            round=assignment.round,
            schedule_round=assignment.schedule_round,
            measures=assignment.measures,
            alone_rounds=assignment.alone_rounds,
            model_path=str(model),
            assets_dir=str(assets),
            frozen=under.frozen,
            folds=under.folds,
            spec=spec.model_dump(mode="json"),
            update_path="" if trained is None else str(trained),
        )
        report(Progress(assignment_id=assignment.id, phase="start"))
        if trained is not None and isinstance(spec.local.algorithm, Scaffold):
            await self._settle(assignment)  # what the run's last update left is where this one starts
        return await self._groups.perform(order, spec.data, _report_work(assignment, report))

    async def _settle(self, assignment: Assignment) -> None:
        """Wait until it is known of what the run's earlier updates left whether it counts."""
        await self._outbox.until_settled(assignment.run_id)
        self._residuals.settle(assignment)

    async def _keep(
        self, assignment: Assignment, spec: RunSpec, model: Path, trained: Path, outcome: Outcome,
        report: Report,
    ) -> Outcome:  # fmt: skip
        """Put a training into the outbox, encoded as the run asks."""

        def encoding(beat: int) -> None:
            report(Progress(assignment_id=assignment.id, phase="encode", done=beat))

        encoding(0)
        under_way: list[asyncio.Future[Outcome]] = []
        try:
            async with signs_of_life(encoding):
                if spec.transport.up != AS_IS:
                    if not self._outbox.is_settled(assignment.run_id):  # which may take long
                        await self._outbox.put_aside(assignment, outcome, trained)
                    await self._settle(assignment)  # what an update left out joins this one, if it counts
                keeping = self._encode_and_add(assignment, spec, model, trained, outcome)
                under_way.append(asyncio.ensure_future(keeping))
                return await asyncio.shield(under_way[0])
        except asyncio.CancelledError:  # a shutdown now must not cost the training
            if spec.transport.up != AS_IS:  # both waiting and encoding may outlast the stop
                await self._outbox.put_aside(assignment, outcome, trained)
            await asyncio.gather(*under_way, return_exceptions=True)
            raise

    async def _encode_and_add(
        self, assignment: Assignment, spec: RunSpec, model: Path, trained: Path, outcome: Outcome
    ) -> Outcome:
        if spec.transport.up != AS_IS:
            from fedloom_client.uplink import encode_update

            out = self._outbox.update_path(assignment.id)
            began_s = time.monotonic()
            await asyncio.to_thread(
                encode_update,
                assignment, spec, trained=trained, model=model, out=out, residuals=self._residuals,
            )  # fmt: skip
            encode_s = time.monotonic() - began_s
            outcome = replace(outcome, phase_seconds=outcome.phase_seconds | {"encode": encode_s})
        outcome = await self._outbox.add(assignment, outcome)
        self._groups.forget_checkpoint(assignment.run_id)
        return outcome

    def _failure(self, assignment: Assignment, reason: str) -> Failure:
        """What the coordinator is told: fedloom's own words, and of others' as much as the policy permits."""
        first, _, rest = reason.strip().partition("\n")
        if not rest or self._consent.shares_failures():
            return Failure(assignment_id=assignment.id, reason=reason)
        told = f"{first} (the rest is in the site's log: policy.failure_details is false)"
        return Failure(assignment_id=assignment.id, reason=told, kept=rest)

    def _explain(self, error: Exception) -> str:
        if os.strerror(errno.ENOSPC) not in str(error):
            return str(error)
        root = self._config.state_dir
        free_bytes = shutil.disk_usage(root).free
        return (
            f"no space left in state_dir {root} ({free_bytes} bytes are free): free some, or move it\n{error}"
        )


def _measured_before(result: WorkerResult) -> Measurement | None:
    before = result.before
    if before is None:
        return None
    return Measurement(
        examples=before.examples, tokens=before.tokens, metrics=before.metrics, weights=before.weights,
        counts=before.counts,
    )  # fmt: skip


def _checkpoint_bytes(local: Local, model_bytes: int) -> int:
    """What local checkpoints take on disk at most: the last one, and the next while it is written."""
    if local.checkpoint_every is None:
        return 0
    moments = 2 if isinstance(local.optimizer, AdamW) else int(local.optimizer.momentum > 0)
    return 2 * (1 + moments) * model_bytes


def _report_download(assignment: Assignment, report: Report) -> OnProgress:
    def on_progress(done: int, total: int) -> None:
        report(Progress(assignment_id=assignment.id, phase="download", done=done, total=total))

    return on_progress


def _report_work(assignment: Assignment, report: Report) -> Callable[[WorkerProgress], None]:
    def on_progress(progress: WorkerProgress) -> None:
        report(
            Progress(
                assignment_id=assignment.id,
                phase=progress.phase,
                done=progress.done,
                total=progress.total,
                loss=progress.loss,
                tokens_per_s=progress.tokens_per_s,
            )
        )

    return on_progress
