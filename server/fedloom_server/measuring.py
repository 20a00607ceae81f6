"""What is measured of a run's models, and when: by those who train from them, or for itself."""

import logging
import time
from collections.abc import Sequence

from fedloom_common.runspec import RunSpec
from fedloom_server.evaluation import before_of, combine
from fedloom_server.federation import Federation
from fedloom_server.records import Assignment, Round, RoundState, Run, Work
from fedloom_server.store import Store
from fedloom_server.watching import RoundChange

logger = logging.getLogger(__name__)


def is_due(spec: RunSpec, number: int) -> bool:
    """Whether the model of a round, 0 for the initial one, is to be measured in its turn."""
    every = spec.evaluation.every_rounds
    return bool(every) and (number % every == 0 if number else spec.evaluation.initial)


def is_measured_now(spec: RunSpec, number: int) -> bool:
    """Whether sites are asked to measure a round's model as soon as it is there."""
    evaluation, is_last = spec.evaluation, number == spec.rounds
    if evaluation.when != "after_round":
        return False
    return is_due(spec, number) or (is_last and bool(evaluation.every_rounds))


def initial_round(run: Run) -> Round:
    """The record of the initial model: to be measured now, or by those who train from it."""
    is_now = is_measured_now(run.spec, 0)
    return Round(
        run_id=run.id, number=0, state=RoundState.EVALUATING if is_now else RoundState.FINISHED,
        base_digest=run.model_digest, model_digest=run.model_digest, model_bytes=run.model_bytes,
        started_at_s=time.time(),
    )  # fmt: skip


def is_measured_by_trainings(run: Run, number: int, store: Store) -> bool:
    """Whether those who train from the model of a round are to measure it first."""
    if run.spec.evaluation.when != "before_training" or not is_due(run.spec, number):
        return False
    central = run.spec.evaluation.central
    asked = (a for a in store.assignments(run.id, number) if a.work is Work.EVALUATE)
    return all(a.site in central for a in asked)


def told_by(run: Run, trainings: Sequence[Assignment], store: Store) -> list[Round]:
    """The rounds whose models these trainings measured, with metrics over all who have by now.

    A late training tells of an older model. What a site measured twice, in two attempts, counts once.
    """
    numbers = {a.base_round for a in trainings if a.base_measured}
    records = [record for number in sorted(numbers) if (record := store.round(run.id, number)) is not None]
    for record in records:
        by_site = {a.site: before_of(a) for a in store.measured_first(run.id, record.number)}
        metrics = combine(told for told in by_site.values() if told is not None)
        record.metrics = record.metrics | metrics
        facts = {"run": run.id, "round": record.number, "sites": len(by_site)}
        shown = {name: round(value, 4) for name, value in metrics.items()}
        logger.info("model measured", extra=facts | {"metrics": shown})
    return records


def tell_round(run: Run, record: Round, federation: Federation) -> None:
    """Pass a round on to those who watch the run, as it now stands."""
    if federation.watching.is_watched(run.id):
        assignments = federation.store.assignments(run.id, record.number)
        federation.watching.tell(run.id, RoundChange(record, assignments))
