"""The run spec: everything that an operator decides about a run, in one file.

The coordinator and every site read the same spec; what belongs to one machine
(paths of data, devices, certificates) is in that machine's own config instead.

    model.py        which model
    adapter.py      small matrices that are trained instead of it
    tasks.py        what it is trained to do
    cohort.py       which sites take part in a round
    local.py        what a site does in a round
    algorithms.py   what a site's steps aim at
    aggregation.py  how updates become the next global model
    rules.py        what their centre is: mean, median, Krum and others
    serveroptimizers.py  what the coordinator makes of that
    transport.py    how both are made smaller for the wire
    mode.py         rounds, or each site at its own pace
    evaluation.py   measuring the model, and what ends the run early
    run.py          all of it, and what contradicts itself
    reading.py      YAML and JSON, the schema
"""

from fedloom_common.runspec.adapter import Lora
from fedloom_common.runspec.aggregation import Aggregation, Clip
from fedloom_common.runspec.algorithms import FedProx, Plain, Scaffold
from fedloom_common.runspec.cohort import Cohort, Staleness
from fedloom_common.runspec.evaluation import Evaluation, Goal, Patience, Stop, Target
from fedloom_common.runspec.local import SGD, AdamW, Local, Schedule
from fedloom_common.runspec.mode import Async, Sync
from fedloom_common.runspec.model import ModelSpec
from fedloom_common.runspec.reading import (
    parse_run_spec,
    read_run_spec,
    require_nothing_left_empty,
    run_spec_schema,
)
from fedloom_common.runspec.rules import (
    AnyRule,
    GeometricMedianRule,
    KrumRule,
    MeanRule,
    MedianRule,
    MultiKrumRule,
    TrimmedMeanRule,
)
from fedloom_common.runspec.run import RunSpec
from fedloom_common.runspec.serveroptimizers import (
    AnyServerOptimizer,
    DiLoCo,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    RoundSchedule,
)
from fedloom_common.runspec.tasks import (
    CausalLM,
    Classification,
    Instruction,
    MaskedLM,
    Plugin,
    Seq2Seq,
    Task,
    TaskKind,
)
from fedloom_common.runspec.transport import Transport

__all__ = [
    "SGD",
    "AdamW",
    "Aggregation",
    "AnyRule",
    "AnyServerOptimizer",
    "Async",
    "CausalLM",
    "Classification",
    "Clip",
    "Cohort",
    "DiLoCo",
    "Evaluation",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "GeometricMedianRule",
    "Goal",
    "Instruction",
    "KrumRule",
    "Local",
    "Lora",
    "MaskedLM",
    "MeanRule",
    "MedianRule",
    "ModelSpec",
    "MultiKrumRule",
    "Patience",
    "Plain",
    "Plugin",
    "RoundSchedule",
    "RunSpec",
    "Scaffold",
    "Schedule",
    "Seq2Seq",
    "Staleness",
    "Stop",
    "Sync",
    "Target",
    "Task",
    "TaskKind",
    "Transport",
    "TrimmedMeanRule",
    "describe",
    "parse_run_spec",
    "read_run_spec",
    "require_nothing_left_empty",
    "run_spec_schema",
]
