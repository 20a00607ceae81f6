"""A rank between orders: it takes them from rank 0, does them, and stays warm."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedloom_client.training.daemonlink import DaemonLink
from fedloom_client.training.data import PackedData, pack
from fedloom_client.training.group import Group
from fedloom_client.training.orders import Cancelled, Job, WorkerProgress, WorkerResult
from fedloom_client.training.pulse import PROGRESS_S
from fedloom_client.training.records import Records
from fedloom_client.training.tasks import new_task, packing_key, refuse_remote_code
from fedloom_client.training.trainer import Trainer
from fedloom_common.errors import FederationError
from fedloom_common.memory import give_memory_back
from fedloom_common.runspec import RunSpec


def serve(group: Group, socket_path: str | None) -> None:
    """Do orders until the daemon wants no more.

    Failures that every rank sees alike are reported, and the group stays; any other ends the process,
    and the launcher starts the group again.
    """
    daemon = DaemonLink(socket_path) if group.rank == 0 and socket_path is not None else None
    rank = WarmRank(group, daemon.progress, daemon.stop_wanted) if daemon else WarmRank(group)
    if daemon is not None:
        daemon.ready(group.world)
    while text := group.share(_next_job(daemon)):
        try:
            result = rank.perform(Job.from_json(text))
        except Cancelled:
            if daemon is not None:
                daemon.cancelled()
        except FederationError as error:
            if daemon is not None:
                daemon.failed(str(error))
        else:
            if daemon is not None:
                daemon.result(result)
        give_memory_back()  # a warm rank may wait for its next order for long
    group.leave()


class WarmRank:
    """One rank and the trainer that it keeps warm; only rank 0 reports, and hears that a stop is wanted."""

    def __init__(
        self,
        group: Group,
        report: Callable[[WorkerProgress], None] = lambda _: None,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._group, self._report, self._stop_wanted = group, report, stop_wanted
        self._trainer: Trainer | None = None

    def perform(self, job: Job) -> WorkerResult:
        """Do a job, with what is left of the one before where that fits.

        Raises:
            Cancelled: the daemon no longer wants it.
            FederationError: it cannot be done; another may.
        """
        started = time.monotonic()
        if self._trainer is None or not self._trainer.fits(job):
            self._trainer = None  # the old model leaves before the new one comes
            self._trainer = self._prepare(job)
        prepared_s = time.monotonic() - started
        result = self._trainer.perform(job.order)
        return replace(result, phase_seconds={"prepare": prepared_s} | result.phase_seconds)

    def _prepare(self, job: Job) -> Trainer:
        spec, assets = RunSpec.model_validate(job.order.spec), Path(job.order.assets_dir)
        refuse_remote_code(assets)
        packed = self._group.first_does(lambda: str(self._pack(job, spec)))
        data = PackedData.open(Path(packed))
        return Trainer(job, data, self._group, self._report, self._stop_wanted)

    def _pack(self, job: Job, spec: RunSpec) -> Path:
        self._report(WorkerProgress(phase="prepare"))
        assets, records = Path(job.order.assets_dir), Records(job.source)
        task, key = new_task(spec.task, assets), packing_key(spec.task, assets)
        return pack(records, task, key, Path(job.packed), self._packed_so_far())

    def _packed_so_far(self) -> Callable[[int, int], None]:
        reported = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal reported
            if self._stop_wanted():
                raise Cancelled
            if time.monotonic() - reported >= PROGRESS_S:
                reported = time.monotonic()
                self._report(WorkerProgress(phase="prepare", done=done, total=total))

        return report


def _next_job(daemon: DaemonLink | None) -> str:
    if daemon is None:
        return ""
    job = daemon.next_job()
    return "" if job is None else job.to_json()
