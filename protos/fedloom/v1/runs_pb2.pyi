from fedloom.v1 import session_pb2 as _session_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_STATE_UNSPECIFIED: _ClassVar[RunState]
    RUN_STATE_QUEUED: _ClassVar[RunState]
    RUN_STATE_RUNNING: _ClassVar[RunState]
    RUN_STATE_FINISHED: _ClassVar[RunState]
    RUN_STATE_FAILED: _ClassVar[RunState]
    RUN_STATE_STOPPED: _ClassVar[RunState]
    RUN_STATE_WAITING: _ClassVar[RunState]
    RUN_STATE_PAUSED: _ClassVar[RunState]

class RoundState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUND_STATE_UNSPECIFIED: _ClassVar[RoundState]
    ROUND_STATE_TRAINING: _ClassVar[RoundState]
    ROUND_STATE_AGGREGATING: _ClassVar[RoundState]
    ROUND_STATE_EVALUATING: _ClassVar[RoundState]
    ROUND_STATE_FINISHED: _ClassVar[RoundState]
    ROUND_STATE_FAILED: _ClassVar[RoundState]

class SiteState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SITE_STATE_UNSPECIFIED: _ClassVar[SiteState]
    SITE_STATE_ACTIVE: _ClassVar[SiteState]
    SITE_STATE_DRAINING: _ClassVar[SiteState]
    SITE_STATE_BLOCKED: _ClassVar[SiteState]
RUN_STATE_UNSPECIFIED: RunState
RUN_STATE_QUEUED: RunState
RUN_STATE_RUNNING: RunState
RUN_STATE_FINISHED: RunState
RUN_STATE_FAILED: RunState
RUN_STATE_STOPPED: RunState
RUN_STATE_WAITING: RunState
RUN_STATE_PAUSED: RunState
ROUND_STATE_UNSPECIFIED: RoundState
ROUND_STATE_TRAINING: RoundState
ROUND_STATE_AGGREGATING: RoundState
ROUND_STATE_EVALUATING: RoundState
ROUND_STATE_FINISHED: RoundState
ROUND_STATE_FAILED: RoundState
SITE_STATE_UNSPECIFIED: SiteState
SITE_STATE_ACTIVE: SiteState
SITE_STATE_DRAINING: SiteState
SITE_STATE_BLOCKED: SiteState

class Run(_message.Message):
    __slots__ = ("id", "name", "state", "reason", "rounds_done", "rounds_total", "submitted_at_s", "started_at_s", "ended_at_s", "model", "spec_json", "priority", "cloned_from", "cloned_round", "frozen", "assets", "best_round", "best_metric", "best_value", "final_round")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_DONE_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_AT_S_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CLONED_FROM_FIELD_NUMBER: _ClassVar[int]
    CLONED_ROUND_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    ASSETS_FIELD_NUMBER: _ClassVar[int]
    BEST_ROUND_FIELD_NUMBER: _ClassVar[int]
    BEST_METRIC_FIELD_NUMBER: _ClassVar[int]
    BEST_VALUE_FIELD_NUMBER: _ClassVar[int]
    FINAL_ROUND_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    state: RunState
    reason: str
    rounds_done: int
    rounds_total: int
    submitted_at_s: float
    started_at_s: float
    ended_at_s: float
    model: _session_pb2.Blob
    spec_json: str
    priority: int
    cloned_from: str
    cloned_round: int
    frozen: _containers.RepeatedCompositeFieldContainer[_session_pb2.Blob]
    assets: _containers.RepeatedCompositeFieldContainer[_session_pb2.Blob]
    best_round: int
    best_metric: str
    best_value: float
    final_round: int
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ..., reason: _Optional[str] = ..., rounds_done: _Optional[int] = ..., rounds_total: _Optional[int] = ..., submitted_at_s: _Optional[float] = ..., started_at_s: _Optional[float] = ..., ended_at_s: _Optional[float] = ..., model: _Optional[_Union[_session_pb2.Blob, _Mapping]] = ..., spec_json: _Optional[str] = ..., priority: _Optional[int] = ..., cloned_from: _Optional[str] = ..., cloned_round: _Optional[int] = ..., frozen: _Optional[_Iterable[_Union[_session_pb2.Blob, _Mapping]]] = ..., assets: _Optional[_Iterable[_Union[_session_pb2.Blob, _Mapping]]] = ..., best_round: _Optional[int] = ..., best_metric: _Optional[str] = ..., best_value: _Optional[float] = ..., final_round: _Optional[int] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("number", "attempt", "state", "reason", "model", "metrics", "sites", "started_at_s", "ended_at_s", "target")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_S_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    number: int
    attempt: int
    state: RoundState
    reason: str
    model: _session_pb2.Blob
    metrics: _containers.ScalarMap[str, float]
    sites: _containers.RepeatedCompositeFieldContainer[SiteRound]
    started_at_s: float
    ended_at_s: float
    target: int
    def __init__(self, number: _Optional[int] = ..., attempt: _Optional[int] = ..., state: _Optional[_Union[RoundState, str]] = ..., reason: _Optional[str] = ..., model: _Optional[_Union[_session_pb2.Blob, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., sites: _Optional[_Iterable[_Union[SiteRound, _Mapping]]] = ..., started_at_s: _Optional[float] = ..., ended_at_s: _Optional[float] = ..., target: _Optional[int] = ...) -> None: ...

class SiteRound(_message.Message):
    __slots__ = ("site", "work", "state", "reason", "examples", "tokens", "metrics", "bytes_down", "bytes_up", "phase_seconds", "attempt", "is_late", "staleness", "turn", "assignment_id", "before", "before_round", "is_central", "data_examples", "alone_rounds")
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
    SITE_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    PHASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    IS_LATE_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    BEFORE_ROUND_FIELD_NUMBER: _ClassVar[int]
    IS_CENTRAL_FIELD_NUMBER: _ClassVar[int]
    DATA_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    ALONE_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    site: str
    work: _session_pb2.Work
    state: str
    reason: str
    examples: int
    tokens: int
    metrics: _containers.ScalarMap[str, float]
    bytes_down: int
    bytes_up: int
    phase_seconds: _containers.ScalarMap[str, float]
    attempt: int
    is_late: bool
    staleness: int
    turn: int
    assignment_id: str
    before: _session_pb2.Measurement
    before_round: int
    is_central: bool
    data_examples: int
    alone_rounds: int
    def __init__(self, site: _Optional[str] = ..., work: _Optional[_Union[_session_pb2.Work, str]] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., examples: _Optional[int] = ..., tokens: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., bytes_down: _Optional[int] = ..., bytes_up: _Optional[int] = ..., phase_seconds: _Optional[_Mapping[str, float]] = ..., attempt: _Optional[int] = ..., is_late: bool = ..., staleness: _Optional[int] = ..., turn: _Optional[int] = ..., assignment_id: _Optional[str] = ..., before: _Optional[_Union[_session_pb2.Measurement, _Mapping]] = ..., before_round: _Optional[int] = ..., is_central: bool = ..., data_examples: _Optional[int] = ..., alone_rounds: _Optional[int] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("spec", "priority")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    spec: str
    priority: int
    def __init__(self, spec: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class CloneRequest(_message.Message):
    __slots__ = ("run_id", "spec", "from_round", "from_latest", "priority")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    FROM_ROUND_FIELD_NUMBER: _ClassVar[int]
    FROM_LATEST_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    spec: str
    from_round: int
    from_latest: bool
    priority: int
    def __init__(self, run_id: _Optional[str] = ..., spec: _Optional[str] = ..., from_round: _Optional[int] = ..., from_latest: bool = ..., priority: _Optional[int] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ("run_id", "reason")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    reason: str
    def __init__(self, run_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ListFailuresRequest(_message.Message):
    __slots__ = ("run_id", "limit")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    limit: int
    def __init__(self, run_id: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListFailuresResponse(_message.Message):
    __slots__ = ("failures",)
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    failures: _containers.RepeatedCompositeFieldContainer[RunFailure]
    def __init__(self, failures: _Optional[_Iterable[_Union[RunFailure, _Mapping]]] = ...) -> None: ...

class RunFailure(_message.Message):
    __slots__ = ("at_s", "round", "attempt", "site", "work", "cause", "message", "log")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    round: int
    attempt: int
    site: str
    work: _session_pb2.Work
    cause: str
    message: str
    log: str
    def __init__(self, at_s: _Optional[float] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., site: _Optional[str] = ..., work: _Optional[_Union[_session_pb2.Work, str]] = ..., cause: _Optional[str] = ..., message: _Optional[str] = ..., log: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: str
    def __init__(self, after: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("runs", "next_after")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_AFTER_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    next_after: str
    def __init__(self, runs: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., next_after: _Optional[str] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("run_id", "from_round")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_ROUND_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    from_round: int
    def __init__(self, run_id: _Optional[str] = ..., from_round: _Optional[int] = ...) -> None: ...

class GetResponse(_message.Message):
    __slots__ = ("run", "rounds", "next_round")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_ROUND_FIELD_NUMBER: _ClassVar[int]
    run: Run
    rounds: _containers.RepeatedCompositeFieldContainer[Round]
    next_round: int
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ..., rounds: _Optional[_Iterable[_Union[Round, _Mapping]]] = ..., next_round: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("run", "round", "site_progress")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SITE_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    run: Run
    round: Round
    site_progress: SiteProgress
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ..., round: _Optional[_Union[Round, _Mapping]] = ..., site_progress: _Optional[_Union[SiteProgress, _Mapping]] = ...) -> None: ...

class SiteProgress(_message.Message):
    __slots__ = ("site", "round", "work", "progress")
    SITE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    site: str
    round: int
    work: _session_pb2.Work
    progress: _session_pb2.Progress
    def __init__(self, site: _Optional[str] = ..., round: _Optional[int] = ..., work: _Optional[_Union[_session_pb2.Work, str]] = ..., progress: _Optional[_Union[_session_pb2.Progress, _Mapping]] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("run_id", "reason")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    reason: str
    def __init__(self, run_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("run_id", "round", "as_adapter", "best")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    AS_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    as_adapter: bool
    best: bool
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., as_adapter: bool = ..., best: bool = ...) -> None: ...

class ExportResponse(_message.Message):
    __slots__ = ("files", "model_card", "run", "frozen", "folds", "round")
    FILES_FIELD_NUMBER: _ClassVar[int]
    MODEL_CARD_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    FOLDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[_session_pb2.Blob]
    model_card: str
    run: Run
    frozen: _containers.RepeatedCompositeFieldContainer[_session_pb2.Blob]
    folds: _containers.RepeatedCompositeFieldContainer[_session_pb2.Blob]
    round: int
    def __init__(self, files: _Optional[_Iterable[_Union[_session_pb2.Blob, _Mapping]]] = ..., model_card: _Optional[str] = ..., run: _Optional[_Union[Run, _Mapping]] = ..., frozen: _Optional[_Iterable[_Union[_session_pb2.Blob, _Mapping]]] = ..., folds: _Optional[_Iterable[_Union[_session_pb2.Blob, _Mapping]]] = ..., round: _Optional[int] = ...) -> None: ...

class ListSitesRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: str
    def __init__(self, after: _Optional[str] = ...) -> None: ...

class ListSitesResponse(_message.Message):
    __slots__ = ("sites", "next_after")
    SITES_FIELD_NUMBER: _ClassVar[int]
    NEXT_AFTER_FIELD_NUMBER: _ClassVar[int]
    sites: _containers.RepeatedCompositeFieldContainer[Site]
    next_after: str
    def __init__(self, sites: _Optional[_Iterable[_Union[Site, _Mapping]]] = ..., next_after: _Optional[str] = ...) -> None: ...

class Site(_message.Message):
    __slots__ = ("name", "connected", "last_heard_at_s", "hello", "state", "reason", "first_heard_at_s", "labels", "operator_labels", "open_assignments", "certificate_expires_at_s")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class OperatorLabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    LAST_HEARD_AT_S_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEARD_AT_S_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_LABELS_FIELD_NUMBER: _ClassVar[int]
    OPEN_ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_EXPIRES_AT_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    connected: bool
    last_heard_at_s: float
    hello: _session_pb2.Hello
    state: SiteState
    reason: str
    first_heard_at_s: float
    labels: _containers.ScalarMap[str, str]
    operator_labels: _containers.ScalarMap[str, str]
    open_assignments: _containers.RepeatedScalarFieldContainer[str]
    certificate_expires_at_s: float
    def __init__(self, name: _Optional[str] = ..., connected: bool = ..., last_heard_at_s: _Optional[float] = ..., hello: _Optional[_Union[_session_pb2.Hello, _Mapping]] = ..., state: _Optional[_Union[SiteState, str]] = ..., reason: _Optional[str] = ..., first_heard_at_s: _Optional[float] = ..., labels: _Optional[_Mapping[str, str]] = ..., operator_labels: _Optional[_Mapping[str, str]] = ..., open_assignments: _Optional[_Iterable[str]] = ..., certificate_expires_at_s: _Optional[float] = ...) -> None: ...
