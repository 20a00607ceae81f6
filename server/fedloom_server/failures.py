"""One record each of what goes wrong in a run, for whoever looks for the cause later."""

import time

from fedloom_server.records import Assignment, AssignmentState, Failure, Round, Run

LOG_LINES = 40
LOG_CHARACTERS = 8_000
MESSAGE_CHARACTERS = 500
FAILURES_KEPT = 1000  # of one run, the newest: a site that fails in every round must not fill the database

FAILED = (AssignmentState.REFUSED, AssignmentState.FAILED, AssignmentState.REJECTED, AssignmentState.LOST)
"""Ends that are a failure; one that was cancelled was no longer wanted."""


def failure_of(assignment: Assignment) -> Failure | None:
    """What went wrong with an assignment; None if nothing did."""
    if assignment.state not in FAILED:
        return None
    message, log = _in_parts(assignment.reason)
    return Failure(
        id=assignment.id, run_id=assignment.run_id, at_s=time.time(), cause=assignment.state,
        message=message, log=log, site=assignment.site, work=assignment.work, round=assignment.round,
        attempt=assignment.attempt,
    )  # fmt: skip


def failure_of_attempt(record: Round) -> Failure:
    """A round's attempt brought too few updates."""
    message, log = _in_parts(record.reason)
    return Failure(
        id=f"{record.run_id}.{record.number}.{record.attempt}", run_id=record.run_id, at_s=time.time(),
        cause="attempt failed", message=message, log=log, round=record.number, attempt=record.attempt,
    )  # fmt: skip


def failure_of_run(run: Run, log: str = "") -> Failure:
    """A run failed, or has to wait; ``log`` holds a traceback if it was the coordinator's own error."""
    message, more = _in_parts(run.reason)
    now_s = time.time()
    return Failure(
        id=f"{run.id}@{now_s:.6f}", run_id=run.id, at_s=now_s, cause=run.state, message=message,
        log=_last_lines(log) or more, round=run.rounds_done + 1,
    )  # fmt: skip


def _in_parts(reason: str) -> tuple[str, str]:
    """The first line, which says what happened, and the last lines of what follows."""
    first, _, rest = reason.strip().partition("\n")
    return first[:MESSAGE_CHARACTERS], _last_lines(rest)


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-LOG_LINES:])[-LOG_CHARACTERS:]
