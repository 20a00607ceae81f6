"""The daemon's messages as protobuf, and back; what the coordinator sends is checked here."""

import math
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Literal

from fedloom.v1 import session_pb2 as pb
from fedloom_client.hardware import Device
from fedloom_client.messages import (
    Answer,
    Assignment,
    Blob,
    Delta,
    Failure,
    Measurement,
    Outcome,
    Progress,
    Refusal,
)
from fedloom_common.digests import DIGEST, is_digest
from fedloom_common.errors import ProtocolError

PROTOCOL_VERSION = 1
_WORK: Mapping[int, Literal["train", "evaluate", "alone"]] = {
    pb.WORK_TRAIN: "train",
    pb.WORK_EVALUATE: "evaluate",
    pb.WORK_ALONE: "alone",
}
REASON_LIMIT_CHARS = 16_000  # a rank's traceback fits; a log that went wild does not fill the session


def hello(
    *,
    devices: Iterable[Device],
    memory_bytes: int,
    data_sets: dict[str, int],
    labels: Mapping[str, str],
    held_digests: Iterable[str],
    open_assignments: Iterable[str],
    kept_runs: Iterable[str],
    evaluates_only: bool,
) -> pb.SiteMessage:
    """The first message of a session; ``data_sets`` maps names to sizes in bytes."""
    return pb.SiteMessage(
        hello=pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            software=f"fedloom {version('fedloom')}",
            devices=[pb.Device(kind=d.kind, name=d.name, memory_bytes=d.memory_bytes) for d in devices],
            memory_bytes=memory_bytes,
            data_sets=[pb.DataSet(name=name, size_bytes=size) for name, size in data_sets.items()],
            labels=labels,
            held_digests=held_digests,
            open_assignments=open_assignments,
            kept_runs=kept_runs,
            evaluates_only=evaluates_only,
        )
    )


def heartbeat() -> pb.SiteMessage:
    """The sign of life."""
    return pb.SiteMessage(heartbeat=pb.Heartbeat())


def site_message(message: Answer | Progress) -> pb.SiteMessage:
    """One message about an assignment, ready to send."""
    match message:
        case Progress():
            return pb.SiteMessage(progress=_progress(message))
        case Outcome():
            return pb.SiteMessage(outcome=_outcome(message))
        case Refusal(assignment_id=name, reason=reason):
            return pb.SiteMessage(refusal=pb.Refusal(assignment_id=name, reason=_cut(reason)))
        case Failure(assignment_id=name, reason=reason):
            return pb.SiteMessage(failure=pb.Failure(assignment_id=name, reason=_cut(reason)))


def assignment_of(message: pb.Assignment) -> Assignment:
    """Check an assignment and take it over.

    Raises:
        ProtocolError: names the field that is missing or wrong.
    """
    if not message.id or not message.run_id:
        raise ProtocolError(
            f"an assignment needs an id and a run_id, came {message.id!r}, {message.run_id!r}"
        )
    if message.work not in _WORK:
        raise ProtocolError(
            f"assignment {message.id} has work {message.work}, known are 1 (train), 2 (evaluate), 3 (alone)"
        )
    if message.work == pb.WORK_ALONE and not message.alone_rounds:
        raise ProtocolError(f"assignment {message.id} has alone_rounds 0, wanted 1 or more")
    if not 0 <= message.deadline_s < math.inf:
        raise ProtocolError(f"assignment {message.id} has deadline_s {message.deadline_s}, wanted 0 or more")
    return Assignment(
        id=message.id,
        work=_WORK[message.work],
        run_id=message.run_id,
        round=message.round,
        attempt=message.attempt,
        model=_blob(message.model, "model"),
        assets=tuple(_blob(asset, "asset") for asset in message.assets),
        spec_json=message.spec_json,
        deadline_s=message.deadline_s,
        delta=_delta(message.delta) if message.HasField("delta") else None,
        schedule_round=message.schedule_round,
        frozen=tuple(_blob(file, "frozen file") for file in message.frozen),
        folds=tuple(_blob(file, "fold") for file in message.folds),
        measures=message.measures,
        alone_rounds=message.alone_rounds,
        counted_round=message.counted_round if message.HasField("counted_round") else None,
    )


def _delta(delta: pb.Delta) -> Delta:
    if not is_digest(delta.base_digest):
        raise ProtocolError(f"the delta's base is {delta.base_digest!r}, wanted {DIGEST}")
    return Delta(file=_blob(delta.file, "delta"), base_digest=delta.base_digest)


def _blob(blob: pb.Blob, what: str) -> Blob:
    if not is_digest(blob.digest) or not blob.size_bytes:
        raise ProtocolError(
            f"the {what} {blob.name!r} has digest {blob.digest!r} and {blob.size_bytes} bytes; "
            f"wanted {DIGEST}, and a size"
        )
    return Blob(name=blob.name, digest=blob.digest, size_bytes=blob.size_bytes)


def _progress(progress: Progress) -> pb.Progress:
    return pb.Progress(
        assignment_id=progress.assignment_id,
        phase=f"PHASE_{progress.phase.upper()}",
        done=progress.done,
        total=progress.total,
        loss=progress.loss,
        tokens_per_s=progress.tokens_per_s,
    )


def _outcome(outcome: Outcome) -> pb.Outcome:
    return pb.Outcome(
        assignment_id=outcome.assignment_id,
        update_digest=outcome.update_digest,
        update_bytes=outcome.update_bytes,
        examples=outcome.examples,
        tokens=outcome.tokens,
        metrics=outcome.metrics,
        metric_weights=outcome.weights,
        metric_counts=_counts(outcome.counts),
        phase_seconds=outcome.phase_seconds,
        before=None if outcome.before is None else _measurement(outcome.before),
        data_examples=outcome.data_examples,
    )


def _measurement(measured: Measurement) -> pb.Measurement:
    return pb.Measurement(
        examples=measured.examples, tokens=measured.tokens, metrics=measured.metrics,
        metric_weights=measured.weights, metric_counts=_counts(measured.counts),
    )  # fmt: skip


def _counts(counts: Mapping[str, list[int]]) -> dict[str, pb.Counts]:
    return {name: pb.Counts(values=values) for name, values in counts.items()}


def _cut(reason: str) -> str:
    reason = reason.encode(errors="backslashreplace").decode()  # it may quote a file's name, of any bytes
    if len(reason) <= REASON_LIMIT_CHARS:
        return reason
    half = REASON_LIMIT_CHARS // 2  # the beginning says what failed, the end holds the traceback's last lines
    return f"{reason[:half]}\n[...]\n{reason[-half:]}"
