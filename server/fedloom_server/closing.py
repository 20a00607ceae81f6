"""What is done once a run has made its last model, before the run ends."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fedloom_server.adapters.parts import models_for, parts_of
from fedloom_server.batches import assigned, evaluations, terms_of_evaluation
from fedloom_server.best import best_of, restores_best
from fedloom_server.evaluation import combined
from fedloom_server.federation import Federation
from fedloom_server.measuring import tell_round
from fedloom_server.pending import Terms
from fedloom_server.records import Assignment, AssignmentState, Run, Work, assignment_id
from fedloom_server.retention import drop_old_models
from fedloom_server.stopping import RoundResult, is_measured


async def measure_last(run: Run, federation: Federation) -> bool:
    """Have the run's last model measured for itself, if nobody has; whether that told anything new.

    No training will, and a round that a stop condition makes the last one may not have been due.

    Raises:
        TooFewSites: nobody is connected who could.
    """
    record = federation.store.round(run.id, run.rounds_done)
    if not run.spec.evaluation.every_rounds or record is None:  # of round 0 if it is not to be measured
        return False
    if is_measured(RoundResult(number=record.number, metrics=record.metrics)):
        return False
    batch = await evaluations(run, record, federation)
    terms = replace(terms_of_evaluation(run, record, federation), elapsed_s=0.0)  # the round has long ended
    await federation.assignments.carry_out(run, batch, terms)
    done = [assignment for assignment in batch if assignment.state is AssignmentState.DONE]
    metrics = combined(done) if done else {}
    record = federation.store.round(run.id, record.number) or record  # a central site may have told more
    is_news = not metrics.keys() <= record.metrics.keys()
    if is_news:
        record.metrics = record.metrics | metrics
        federation.store.save(record)
        tell_round(run, record, federation)
    return is_news


async def train_alone(run: Run, federation: Federation) -> None:
    """Have each site that took part train by itself, from the initial model, if the run asks for it.

    A site that is not there, or falls silent, is given up after ``cohort.stall_s``.
    """
    if not run.spec.evaluation.alone:
        return
    store = federation.store
    stored = [a for a in store.assignments(run.id, run.rounds_done) if a.work is Work.ALONE]
    batch = stored or await _trainings_alone(run, federation)
    if not batch:
        return
    await _have_final_measured(run, [assignment.site for assignment in batch], federation)
    parts = parts_of(store, run, _initial_digest(run, federation))
    terms = Terms(needed=0, deadline_s=None, stall_s=run.spec.cohort.stall_s, folds=parts.folds)
    record = store.round(run.id, run.rounds_done)
    assert record is not None, "somebody has trained"
    tell_round(run, record, federation)
    await federation.assignments.carry_out(
        run, batch, terms, on_end=lambda: tell_round(run, record, federation)
    )
    drop_old_models(store, run, federation.keep_models)


async def _have_final_measured(run: Run, sites: Sequence[str], federation: Federation) -> None:
    """Ask those of the sites that are there and have yet to measure the final model, so as to compare."""
    store, best = federation.store, best_of(run.spec, federation.store.history(run.id))
    number = best.number if best is not None and restores_best(run.spec) else run.rounds_done
    record = store.round(run.id, number)
    assert record is not None, "it has a model"
    evaluated = [a for a in store.assignments(run.id, number) if a.work is Work.EVALUATE]
    told = {a.site for a in evaluated if a.state is AssignmentState.DONE}
    told |= {a.site for a in store.measured_first(run.id, number) if a.base_measured}
    await store.files.bring(record.model_digest)
    missing = [site for site in sites if site not in told and federation.sites.link(site)]
    batch = assigned(run, record, Work.EVALUATE, missing, federation)
    terms = replace(terms_of_evaluation(run, record, federation), elapsed_s=0.0)
    await federation.assignments.carry_out(run, batch, terms)


async def _trainings_alone(run: Run, federation: Federation) -> list[Assignment]:
    """One for each site whose updates counted, for as many rounds as they did."""
    store, digest = federation.store, _initial_digest(run, federation)
    await store.files.bring(digest)
    attempts = {record.number: record.attempt for record in store.rounds(run.id) if record.model_digest}
    counted = Counter(
        a.site for a in store.assignments(run.id)
        if a.work is Work.TRAIN and a.state is AssignmentState.DONE and not a.is_late
        and attempts.get(a.round) == a.attempt
    )  # fmt: skip
    models = models_for(store, run, digest, counted)
    batch = [
        Assignment(
            id=assignment_id(run.id, run.rounds_done, 1, Work.ALONE, site), run_id=run.id,
            round=run.rounds_done, attempt=attempts[run.rounds_done], work=Work.ALONE, site=site,
            model_digest=models[site].digest, model_bytes=models[site].size_bytes, measures=True,
            alone_rounds=rounds,
        )
        for site, rounds in sorted(counted.items())
    ]  # fmt: skip
    store.save(*batch)
    return batch


def _initial_digest(run: Run, federation: Federation) -> str:
    return federation.store.rounds(run.id)[0].base_digest
