"""The assignments of a round: who is asked to work in it, and whose late updates it takes."""

import math
import time
from collections.abc import Sequence
from fractions import Fraction

from fedloom_common.errors import TooFewSites
from fedloom_server.adapters.parts import models_for, parts_of
from fedloom_server.codecs import most_update_bytes
from fedloom_server.cohorts import draw_cohort, sites_needed, wanted
from fedloom_server.downlink import delta_to
from fedloom_server.federation import Federation
from fedloom_server.folding import folds_early
from fedloom_server.measuring import is_measured_by_trainings
from fedloom_server.pending import Terms
from fedloom_server.records import Assignment, AssignmentState, Round, Run, Work, assignment_id
from fedloom_server.selection import cohort_size
from fedloom_server.sites import Sites


async def trainings(run: Run, record: Round, federation: Federation) -> list[Assignment]:
    """The trainings of a round's present attempt: late ones of earlier rounds, then the cohort's, in order.

    Raises:
        TooFewSites: fewer sites are connected than ``cohort.min_sites``.
    """
    if not record.cohort:
        await _choose(run, record, federation)
    late = _taken_over(run, record, federation)
    batch = late + assigned(run, record, Work.TRAIN, record.cohort, federation)
    return [assignment for assignment in batch if not assignment.is_late]  # else the round went on already


async def evaluations(run: Run, record: Round, federation: Federation) -> list[Assignment]:
    """Measurements of a round's model, by every connected site that has the run's data and is not late.

    Raises:
        TooFewSites: none is connected, or fewer than ``cohort.min_sites`` if it is the initial model.
    """
    stored = federation.store.assignments(run.id, record.number)
    central = run.spec.evaluation.central
    batch = [a for a in stored if a.work is Work.EVALUATE and a.site not in central]
    if batch:
        return batch
    await _wait_for_return(run, record.number, federation)
    busy = _busy(federation.store.late(run.id))
    sites = [site for site in federation.sites.fitting(wanted(run.spec)) if site not in busy]
    if record.number == 0 or not (sites or busy):
        require_sites(run, federation.sites)  # nobody may be there yet, or any more
    record.asked_at_s = time.time()
    return assigned(run, record, Work.EVALUATE, sites, federation)


def assigned(
    run: Run, record: Round, work: Work, sites: Sequence[str], federation: Federation
) -> list[Assignment]:
    """This attempt's assignments, in the order of ``sites``: those stored, and new ones for the rest."""
    digest = record.base_digest if work is Work.TRAIN else record.model_digest
    models = models_for(federation.store, run, digest, sites)
    measures = work is Work.TRAIN and is_measured_by_trainings(run, record.number - 1, federation.store)
    stored = {assignment.id: assignment for assignment in federation.store.assignments(run.id, record.number)}
    batch = []
    for site in sites:
        name = assignment_id(run.id, record.number, record.attempt, work, site)
        fresh = Assignment(
            id=name, run_id=run.id, round=record.number, attempt=record.attempt, work=work, site=site,
            model_digest=models[site].digest, model_bytes=models[site].size_bytes, measures=measures,
        )  # fmt: skip
        batch.append(stored.get(name, fresh))
    federation.store.save(run, record, *batch)
    return batch


def still_late(batch: Sequence[Assignment]) -> list[Assignment]:
    """Late trainings of a failed attempt, made ready for the next one to take over.

    An update that is folded is open again: its sum is of no use without the attempt's other updates.
    """
    late = [a for a in batch if a.staleness and a.state in (AssignmentState.OPEN, AssignmentState.DONE)]
    for assignment in late:
        assignment.is_late = True
        if assignment.is_folded:
            assignment.state, assignment.update_digest, assignment.is_folded = AssignmentState.OPEN, "", False
    return late


def terms_of_training(run: Run, record: Round, batch: Sequence[Assignment], federation: Federation) -> Terms:
    """What holds for all who train from a round's base model."""
    cohort, store = run.spec.cohort, federation.store
    return Terms(
        needed=cohort.needed, target=record.target, stall_s=cohort.stall_s,
        deadline_s=cohort.deadline_s, elapsed_s=_elapsed_s(record),
        carries_late=cohort.late == "carry", comes_first=not folds_early(run, record, store),
        delta=delta_to(store, run, record.base_digest),
        most_update_bytes=most_update_bytes(run.spec.transport.up, store.files.path(record.base_digest)),
        folds=parts_of(store, run, record.base_digest).folds,
        counted=store.counted_rounds(run.id, {a.site for a in batch}) if run.spec.leaves_at_sites else None,
    )  # fmt: skip


def terms_of_evaluation(run: Run, record: Round, federation: Federation) -> Terms:
    """What holds for all who measure a round's model."""
    return Terms(
        needed=0, stall_s=run.spec.cohort.stall_s,
        deadline_s=run.spec.evaluation.deadline_s, elapsed_s=_elapsed_s(record),
        delta=delta_to(federation.store, run, record.model_digest),
        folds=parts_of(federation.store, run, record.model_digest).folds,
    )  # fmt: skip


def require_sites(run: Run, sites: Sites, besides: int = 0) -> None:
    """Check that enough sites fit for a run to go on, with so many ``besides`` those that are free.

    Raises:
        TooFewSites: says how many there are, and what the others lack.
    """
    needed, what = sites_needed(run), wanted(run.spec)
    if len(sites.fitting(what)) + besides < needed:
        raise TooFewSites(f"waits for sites: {sites.shortfall(what, needed)}")


def _taken_over(run: Run, record: Round, federation: Federation) -> list[Assignment]:
    """Trainings that earlier rounds and attempts left to later ones, moved to this; those too late end.

    Nothing may come between this and what is done with the batch: an update may arrive at any moment.
    """
    store, most = federation.store, run.spec.cohort.staleness.max
    here = (record.number, record.attempt)
    earlier = [
        assignment for assignment in store.late(run.id) if (assignment.round, assignment.attempt) < here
    ]
    late = [federation.assignments.present(assignment) for assignment in earlier]
    for assignment in late:
        assignment.staleness += record.number - assignment.round
        assignment.round, assignment.attempt, assignment.is_late = record.number, record.attempt, False
    store.save(run, record, *late)
    for assignment in late:
        if assignment.staleness > most:
            reason = f"its update is {assignment.staleness} rounds late, cohort.staleness.max is {most}"
            federation.assignments.expire(assignment, reason)
    mine = map(federation.assignments.present, store.assignments(run.id, record.number))
    hopeful = (AssignmentState.OPEN, AssignmentState.DONE)
    return [a for a in mine if a.staleness and a.attempt == record.attempt and a.state in hopeful]


async def _choose(run: Run, record: Round, federation: Federation) -> None:
    """Fill the cohort; a site that is still at work on an earlier round has its place in this one by that."""
    await _wait_for_return(run, record.number - 1, federation)
    cohort, fitting = run.spec.cohort, federation.sites.fitting(wanted(run.spec))
    busy = _busy(federation.store.late(run.id))
    free = [site for site in fitting if site not in busy]
    require_sites(run, federation.sites, besides=len(busy.difference(fitting)))
    target = max(0, cohort_size(cohort, len(free) + len(busy)) - len(busy))
    count = min(len(free), math.ceil(target * (1 + Fraction(str(cohort.over_select)))))
    if count:
        drawn = await draw_cohort(
            run, record, free, store=federation.store, sites=federation.sites, count=count
        )
        record.cohort = list(drawn)
    record.population = len(free) + len(busy)
    record.target = target + len(busy) if cohort.over_select else 0
    record.asked_at_s = time.time()


async def _wait_for_return(run: Run, number: int, federation: Federation) -> None:
    """After a start of the coordinator, give the sites that had done a round's work time to attach again."""
    if federation.sites.may_return:
        stored = federation.store.assignments(run.id, number)
        await federation.sites.returned({a.site for a in stored if a.state is AssignmentState.DONE})


def _elapsed_s(record: Round) -> float:
    """Seconds since the round's sites were asked; none if the clock was set back, or it is not known."""
    return max(0.0, time.time() - record.asked_at_s) if record.asked_at_s else 0.0


def _busy(late: Sequence[Assignment]) -> set[str]:
    return {assignment.site for assignment in late if assignment.state is AssignmentState.OPEN}
