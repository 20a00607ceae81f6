from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_DOWNLOAD: _ClassVar[Phase]
    PHASE_START: _ClassVar[Phase]
    PHASE_PREPARE: _ClassVar[Phase]
    PHASE_TRAIN: _ClassVar[Phase]
    PHASE_EVALUATE: _ClassVar[Phase]
    PHASE_WAIT: _ClassVar[Phase]
    PHASE_UPLOAD: _ClassVar[Phase]
    PHASE_QUEUED: _ClassVar[Phase]
    PHASE_ENCODE: _ClassVar[Phase]

class Work(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORK_UNSPECIFIED: _ClassVar[Work]
    WORK_TRAIN: _ClassVar[Work]
    WORK_EVALUATE: _ClassVar[Work]
    WORK_ALONE: _ClassVar[Work]
PHASE_UNSPECIFIED: Phase
PHASE_DOWNLOAD: Phase
PHASE_START: Phase
PHASE_PREPARE: Phase
PHASE_TRAIN: Phase
PHASE_EVALUATE: Phase
PHASE_WAIT: Phase
PHASE_UPLOAD: Phase
PHASE_QUEUED: Phase
PHASE_ENCODE: Phase
WORK_UNSPECIFIED: Work
WORK_TRAIN: Work
WORK_EVALUATE: Work
WORK_ALONE: Work

class SiteMessage(_message.Message):
    __slots__ = ("hello", "heartbeat", "progress", "outcome", "refusal", "failure")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    progress: Progress
    outcome: Outcome
    refusal: Refusal
    failure: Failure
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("welcome", "assignment", "upload_grant", "cancel", "drain", "run_ended")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_GRANT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    RUN_ENDED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    assignment: Assignment
    upload_grant: UploadGrant
    cancel: Cancel
    drain: Drain
    run_ended: RunEnded
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., upload_grant: _Optional[_Union[UploadGrant, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., run_ended: _Optional[_Union[RunEnded, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "software", "devices", "memory_bytes", "data_sets", "held_digests", "open_assignments", "kept_runs", "labels", "evaluates_only")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_SETS_FIELD_NUMBER: _ClassVar[int]
    HELD_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    OPEN_ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    KEPT_RUNS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    EVALUATES_ONLY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    software: str
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    memory_bytes: int
    data_sets: _containers.RepeatedCompositeFieldContainer[DataSet]
    held_digests: _containers.RepeatedScalarFieldContainer[str]
    open_assignments: _containers.RepeatedScalarFieldContainer[str]
    kept_runs: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.ScalarMap[str, str]
    evaluates_only: bool
    def __init__(self, protocol_version: _Optional[int] = ..., software: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., memory_bytes: _Optional[int] = ..., data_sets: _Optional[_Iterable[_Union[DataSet, _Mapping]]] = ..., held_digests: _Optional[_Iterable[str]] = ..., open_assignments: _Optional[_Iterable[str]] = ..., kept_runs: _Optional[_Iterable[str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., evaluates_only: bool = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("kind", "name", "memory_bytes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    memory_bytes: int
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ..., memory_bytes: _Optional[int] = ...) -> None: ...

class DataSet(_message.Message):
    __slots__ = ("name", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Progress(_message.Message):
    __slots__ = ("assignment_id", "phase", "done", "total", "loss", "tokens_per_s")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    phase: Phase
    done: int
    total: int
    loss: float
    tokens_per_s: float
    def __init__(self, assignment_id: _Optional[str] = ..., phase: _Optional[_Union[Phase, str]] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., loss: _Optional[float] = ..., tokens_per_s: _Optional[float] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("assignment_id", "update_digest", "update_bytes", "examples", "tokens", "metrics", "phase_seconds", "before", "data_examples", "metric_weights", "metric_counts")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class PhaseSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class MetricWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class MetricCountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Counts
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Counts, _Mapping]] = ...) -> None: ...
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    UPDATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    UPDATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    PHASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    DATA_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRIC_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    METRIC_COUNTS_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    update_digest: str
    update_bytes: int
    examples: int
    tokens: int
    metrics: _containers.ScalarMap[str, float]
    phase_seconds: _containers.ScalarMap[str, float]
    before: Measurement
    data_examples: int
    metric_weights: _containers.ScalarMap[str, int]
    metric_counts: _containers.MessageMap[str, Counts]
    def __init__(self, assignment_id: _Optional[str] = ..., update_digest: _Optional[str] = ..., update_bytes: _Optional[int] = ..., examples: _Optional[int] = ..., tokens: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., phase_seconds: _Optional[_Mapping[str, float]] = ..., before: _Optional[_Union[Measurement, _Mapping]] = ..., data_examples: _Optional[int] = ..., metric_weights: _Optional[_Mapping[str, int]] = ..., metric_counts: _Optional[_Mapping[str, Counts]] = ...) -> None: ...

class Counts(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class Measurement(_message.Message):
    __slots__ = ("examples", "tokens", "metrics", "metric_weights", "metric_counts")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class MetricWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class MetricCountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Counts
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Counts, _Mapping]] = ...) -> None: ...
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    METRIC_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    METRIC_COUNTS_FIELD_NUMBER: _ClassVar[int]
    examples: int
    tokens: int
    metrics: _containers.ScalarMap[str, float]
    metric_weights: _containers.ScalarMap[str, int]
    metric_counts: _containers.MessageMap[str, Counts]
    def __init__(self, examples: _Optional[int] = ..., tokens: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., metric_weights: _Optional[_Mapping[str, int]] = ..., metric_counts: _Optional[_Mapping[str, Counts]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("assignment_id", "reason")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    reason: str
    def __init__(self, assignment_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("assignment_id", "reason")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    reason: str
    def __init__(self, assignment_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "site", "heartbeat_s")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    site: str
    heartbeat_s: float
    def __init__(self, protocol_version: _Optional[int] = ..., site: _Optional[str] = ..., heartbeat_s: _Optional[float] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("id", "work", "run_id", "round", "attempt", "model", "assets", "spec_json", "deadline_s", "stall_s", "delta", "schedule_round", "frozen", "folds", "measures", "alone_rounds", "counted_round")
    ID_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ASSETS_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_ROUND_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    FOLDS_FIELD_NUMBER: _ClassVar[int]
    MEASURES_FIELD_NUMBER: _ClassVar[int]
    ALONE_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    COUNTED_ROUND_FIELD_NUMBER: _ClassVar[int]
    id: str
    work: Work
    run_id: str
    round: int
    attempt: int
    model: Blob
    assets: _containers.RepeatedCompositeFieldContainer[Blob]
    spec_json: str
    deadline_s: float
    stall_s: float
    delta: Delta
    schedule_round: int
    frozen: _containers.RepeatedCompositeFieldContainer[Blob]
    folds: _containers.RepeatedCompositeFieldContainer[Blob]
    measures: bool
    alone_rounds: int
    counted_round: int
    def __init__(self, id: _Optional[str] = ..., work: _Optional[_Union[Work, str]] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., model: _Optional[_Union[Blob, _Mapping]] = ..., assets: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., spec_json: _Optional[str] = ..., deadline_s: _Optional[float] = ..., stall_s: _Optional[float] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., schedule_round: _Optional[int] = ..., frozen: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., folds: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., measures: bool = ..., alone_rounds: _Optional[int] = ..., counted_round: _Optional[int] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("file", "base_digest")
    FILE_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    file: Blob
    base_digest: str
    def __init__(self, file: _Optional[_Union[Blob, _Mapping]] = ..., base_digest: _Optional[str] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("name", "digest", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class UploadGrant(_message.Message):
    __slots__ = ("assignment_id", "upload", "offset")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    upload: str
    offset: int
    def __init__(self, assignment_id: _Optional[str] = ..., upload: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("assignment_id", "reason", "counts")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    reason: str
    counts: bool
    def __init__(self, assignment_id: _Optional[str] = ..., reason: _Optional[str] = ..., counts: bool = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class RunEnded(_message.Message):
    __slots__ = ("run_id", "may_resume")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    MAY_RESUME_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    may_resume: bool
    def __init__(self, run_id: _Optional[str] = ..., may_resume: bool = ...) -> None: ...
