"""The coordinator's records as messages of the contract."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedloom.v1 import runs_pb2, session_pb2
from fedloom_server.adapters.parts import Parts
from fedloom_server.best import best_of, final_round
from fedloom_server.downlink import Delta
from fedloom_server.evaluation import before_of
from fedloom_server.records import Assignment, Failure, Round, Run, Work
from fedloom_server.roster import Site
from fedloom_server.stopping import RoundResult
from fedloom_server.store import Store
from fedloom_server.watching import Change, RoundChange, SiteProgress

DELTA_FILE = "delta.safetensors"

_WORK = {
    Work.TRAIN: session_pb2.WORK_TRAIN,
    Work.EVALUATE: session_pb2.WORK_EVALUATE,
    Work.ALONE: session_pb2.WORK_ALONE,
}


def work_message(work: Work) -> session_pb2.Work:
    """What an assignment asks for."""
    return _WORK[work]


def phase_name(phase: session_pb2.Phase) -> str:
    """ "download", "train" and so on; "unspecified" for what a newer site may send."""
    names = {number: name for name, number in session_pb2.Phase.items()}
    return names.get(phase, "PHASE_UNSPECIFIED").removeprefix("PHASE_").lower()


def blob(file: Mapping[str, Any]) -> session_pb2.Blob:
    """A file that TransferService.Read serves."""
    return session_pb2.Blob(name=file["name"], digest=file["digest"], size_bytes=file["size_bytes"])


def delta_message(delta: Delta) -> session_pb2.Delta:
    """A smaller way to a model."""
    file = session_pb2.Blob(name=DELTA_FILE, digest=delta.file.digest, size_bytes=delta.file.size_bytes)
    return session_pb2.Delta(file=file, base_digest=delta.base_digest)


def run_message(run: Run, history: Sequence[RoundResult], model_name: str) -> runs_pb2.Run:
    """A run; ``history`` has every finished round."""
    best = best_of(run.spec, history)
    return runs_pb2.Run(
        id=run.id,
        name=run.name,
        state=f"RUN_STATE_{run.state.name}",
        reason=run.reason,
        rounds_done=run.rounds_done,
        rounds_total=run.spec.rounds,
        submitted_at_s=run.submitted_at_s,
        started_at_s=run.started_at_s,
        ended_at_s=run.ended_at_s,
        model=session_pb2.Blob(name=model_name, digest=run.model_digest, size_bytes=run.model_bytes),
        spec_json=run.spec_json,
        priority=run.priority,
        cloned_from=run.cloned_from,
        cloned_round=run.cloned_round,
        best_round=None if best is None else best.number,
        best_metric=run.spec.goal.metric,
        best_value=None if best is None else best.metrics[run.spec.goal.metric],
        final_round=final_round(run, history),
        frozen=[blob(asdict(file)) for file in Parts.from_json(run.adapter).frozen],
        assets=[blob(file) for file in run.assets],
    )


def round_message(
    record: Round, assignments: Sequence[Assignment], model_name: str, *, central: Collection[str] = ()
) -> runs_pb2.Round:
    """A round with what each site did in it, every attempt; ``central`` names those that only measure."""
    model = None
    if record.model_digest:
        model = session_pb2.Blob(name=model_name, digest=record.model_digest, size_bytes=record.model_bytes)
    return runs_pb2.Round(
        number=record.number,
        attempt=record.attempt,
        state=f"ROUND_STATE_{record.state.name}",
        reason=record.reason,
        model=model,
        metrics=record.metrics,
        sites=[_site_round(assignment, is_central=assignment.site in central) for assignment in assignments],
        started_at_s=record.started_at_s,
        ended_at_s=record.ended_at_s,
        target=record.target,
    )


def _site_round(assignment: Assignment, *, is_central: bool) -> runs_pb2.SiteRound:
    before = None
    if (known := before_of(assignment)) is not None:
        before = session_pb2.Measurement(
            examples=known.examples, tokens=known.tokens, metrics=known.metrics, metric_weights=known.weights,
            metric_counts={name: session_pb2.Counts(values=values) for name, values in known.counts.items()},
        )  # fmt: skip
    return runs_pb2.SiteRound(
        site=assignment.site,
        attempt=assignment.attempt,
        assignment_id=assignment.id,
        turn=assignment.turn,
        staleness=assignment.staleness,
        work=work_message(assignment.work),
        state=assignment.state,
        reason=assignment.reason,
        examples=assignment.examples,
        tokens=assignment.tokens,
        metrics=assignment.metrics,
        bytes_down=assignment.bytes_down,
        bytes_up=assignment.bytes_up,
        phase_seconds=assignment.phase_seconds,
        is_late=assignment.is_late,
        is_central=is_central,
        before=before,
        before_round=0 if before is None else assignment.base_round,
        data_examples=assignment.data_examples,
        alone_rounds=assignment.alone_rounds,
    )


def failure_message(failure: Failure) -> runs_pb2.RunFailure:
    """One thing that went wrong."""
    return runs_pb2.RunFailure(
        at_s=failure.at_s,
        round=failure.round,
        attempt=failure.attempt,
        site=failure.site,
        work=work_message(Work(failure.work)) if failure.work else session_pb2.WORK_UNSPECIFIED,
        cause=failure.cause,
        message=failure.message,
        log=failure.log,
    )


def change_message(change: Change, store: Store, model_name: str) -> runs_pb2.WatchEvent:
    """A change for a watcher."""
    match change:
        case Run():
            return runs_pb2.WatchEvent(run=run_message(change, store.history(change.id), model_name))
        case RoundChange():
            central = store.run(change.round.run_id).spec.evaluation.central
            message = round_message(change.round, change.assignments, model_name, central=central)
            return runs_pb2.WatchEvent(round=message)
        case SiteProgress():
            return runs_pb2.WatchEvent(site_progress=_progress_message(change))


def _progress_message(change: SiteProgress) -> runs_pb2.SiteProgress:
    progress = session_pb2.Progress(
        assignment_id=change.assignment_id,
        phase=f"PHASE_{change.phase.upper()}",
        done=change.done,
        total=change.total,
        loss=change.loss,
        tokens_per_s=change.tokens_per_s,
    )
    return runs_pb2.SiteProgress(
        site=change.site, round=change.round, work=work_message(change.work), progress=progress
    )


def site_message(site: Site, open_assignments: Iterable[str]) -> runs_pb2.Site:
    """A site as it described itself, and what operators decided."""
    described, record = site.description, site.record
    hello = session_pb2.Hello(
        software=described.software,
        memory_bytes=described.memory_bytes,
        devices=[
            session_pb2.Device(kind=device.kind, name=device.name, memory_bytes=device.memory_bytes)
            for device in described.devices
        ],
        data_sets=[
            session_pb2.DataSet(name=name, size_bytes=size) for name, size in described.data_sets.items()
        ],
        labels=record.own_labels,
        evaluates_only=described.evaluates_only,
    )
    return runs_pb2.Site(
        name=site.name,
        connected=site.link is not None,
        last_heard_at_s=record.last_heard_s,
        hello=hello,
        state=f"SITE_STATE_{record.state.name}",
        reason=record.reason,
        first_heard_at_s=record.first_heard_s,
        labels=site.labels,
        operator_labels=record.operator_labels,
        open_assignments=open_assignments,
        certificate_expires_at_s=site.certificate_expires_s,
    )
