"""What becomes of a run's rounds when it ends early, and when it is taken up after its end."""

import time

from fedloom_common.errors import BadTensor
from fedloom_server.records import AssignmentState, Base, Round, RoundState, Run, Work
from fedloom_server.store import Store


def close_rounds(store: Store, run: Run, error: Exception | None) -> list[Round]:
    """Close a run's unfinished rounds, for the caller to save: training is lost, later steps can go on.

    ``error`` is what the run failed by. Updates that make no model are lost too: they would make none again.
    """
    lost = {RoundState.TRAINING}
    if isinstance(error, BadTensor):
        lost.add(RoundState.AGGREGATING)
    unfinished = store.unfinished_rounds(run.id)
    for record in unfinished:
        record.ended_at_s = run.ended_at_s
        if record.state in lost:
            record.state, record.reason = RoundState.FAILED, f"the run was {run.state}"
    return unfinished


def begin_again(store: Store, run: Run) -> None:
    """Save a run that is taken up after its end: training begins a new attempt, later steps go on.

    Where two versions of an asynchronous run have lost their updates, the later one begins after the earlier.
    """
    rounds = store.rounds(run.id)
    lost = [record for record in rounds if record.state in (RoundState.TRAINING, RoundState.FAILED)]
    for record in lost[:1]:
        record.state, record.cohort = RoundState.TRAINING, []
        record.attempt = record.first_attempt = record.attempt + 1
        record.sum_digest = ""
    changed: list[Base] = [run]
    for record in rounds:
        if record.state not in (RoundState.FINISHED, RoundState.FAILED):
            record.ended_at_s, record.asked_at_s = 0.0, time.time()
            changed.append(record)
        if record.state is RoundState.EVALUATING or record.number == run.rounds_done:
            cancelled = [
                assignment
                for assignment in store.assignments(run.id, record.number)
                if assignment.work is not Work.TRAIN and assignment.state is AssignmentState.CANCELLED
            ]
            for assignment in cancelled:
                assignment.state, assignment.reason = AssignmentState.OPEN, ""
            changed += cancelled
    store.save(*changed)
