"""Null training with a peer: its own server, clients and operator as processes, followed to the end."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from environments import Environment
from measure import Sampler
from nulltraining import Case, Figures, figures, gpt2_shapes
from processes import Processes, wait_for_port

APPS = Path(__file__).resolve().parent / "peer_apps"
POLL_S = 0.2
OPERATOR = "operator"
LAST_WORDS_S = 30.0  # a run may outlive its operator's program, which only looks on
TOLERANCE = 1e-5  # of means in other orders of additions: a hundredth of one round's constant


class Deployment(Protocol):
    """How one peer is set up for a case, in a folder of its own."""

    system: ClassVar[str]
    """The peer's name, for people."""
    package: ClassVar[str]
    version: ClassVar[str]
    requirements: ClassVar[tuple[str, ...]]
    """What its environment is made of."""
    port: int
    """Where the server listens."""

    def __init__(self, environment: Environment, folder: Path, sites: int) -> None: ...

    def provision(self) -> None:
        """Make certificates and configs; not measured."""

    def start(self, processes: Processes, environment: dict[str, str]) -> None:
        """Start ``server`` and the ``site-…`` processes."""

    def submit(self, processes: Processes, environment: dict[str, str]) -> None:
        """Start ``operator``, a program that submits the run and ends when the run has."""


@dataclass
class Told:
    """What the program at the server has written so far."""

    marks_s: list[float]
    """When the first round began, and each one's end."""
    verdict: dict[str, Any] | None
    """How far off the model is, when the last round is done."""

    @classmethod
    def read(cls, path: Path) -> "Told":
        """All whole lines."""
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        verdicts = [line for line in lines if "off_by" in line]
        return cls(
            marks_s=[line["at_s"] for line in lines if "at_s" in line],
            verdict=verdicts[0] if verdicts else None,
        )


def run_peer(deployment: Deployment, case: Case, folder: Path, *, round_limit_s: float) -> Figures:
    """Measure one case.

    Raises:
        SystemExit: the run does not finish in time, or its model is not what it must be.
    """
    shapes, marks = gpt2_shapes(case.model_bytes), folder / "marks"
    facts = {"sites": case.sites, "rounds": case.rounds, "shapes": shapes, "marks": str(marks)}
    (folder / "case.json").write_text(json.dumps(facts))
    environment = {"FEDLOOM_BENCHMARK_CASE": str(folder / "case.json"), "PYTHONPATH": str(APPS)}
    deployment.provision()
    with Processes(folder / "logs") as processes, Processes(folder / "logs") as operators:
        started_at_s = time.time()
        deployment.start(processes, environment)
        with Sampler(processes.pids()) as sampler:
            wait_for_port(deployment.port, processes)
            deployment.submit(operators, environment)
            told = Watch(marks, case.rounds, processes, operators).until_told(round_limit_s)
    require_sum(told)
    return figures(
        deployment.system,
        case,
        sampler,
        model_bytes=4 * sum(math.prod(shape) for shape in shapes.values()),
        started_at_s=started_at_s,
        rounds_began_at_s=told.marks_s[0],
        round_ends_s=told.marks_s[1:],
        own_loopback=False,
        extra=told.verdict or {},
    )


class Watch:
    """Follows a run to its end, good or bad."""

    def __init__(self, marks: Path, rounds: int, processes: Processes, operators: Processes) -> None:
        self._marks = marks
        self._rounds = rounds
        self._processes = processes
        self._operators = operators

    def until_told(self, round_limit_s: float) -> Told:
        """What the server told, once it is complete.

        Raises:
            SystemExit: a process ended too early, or a round takes too long.
        """
        moved_at_s, done, limit_s = time.monotonic(), 0, round_limit_s
        while True:
            told = Told.read(self._marks)
            if told.verdict is not None and len(told.marks_s) == self._rounds + 1:
                return told
            self._processes.require_alive()
            now_s = time.monotonic()
            if len(told.marks_s) > done:
                done, moved_at_s = len(told.marks_s), now_s
            if limit_s == round_limit_s and self._operators.ended(OPERATOR):
                limit_s = min(round_limit_s, now_s - moved_at_s + LAST_WORDS_S)
            if now_s - moved_at_s > limit_s:
                raise SystemExit(self._trouble(done, limit_s))
            time.sleep(POLL_S)

    def _trouble(self, done: int, limit_s: float) -> str:
        what = f"round {max(1, done)} of {self._rounds} is not done after {limit_s:.3g} s"
        if self._operators.ended(OPERATOR):
            what += f", and the operator's program has ended:\n{self._operators.told(OPERATOR)}"
        return f"{what}\nthe server's last lines:\n{self._processes.told('server')}"


def require_sum(told: Told) -> None:
    """Check that every round added the constant: a fast wrong answer is no figure.

    Raises:
        SystemExit: it did not.
    """
    verdict = told.verdict or {}
    if verdict.get("wrong") or not verdict.get("off_by", 1.0) <= TOLERANCE:  # NaN is not
        raise SystemExit(f"the last model is not the first plus a constant a round: {verdict}")
