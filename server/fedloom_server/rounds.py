"""THE round loop: start reading here.

A run is a sequence of rounds. In each a cohort of sites trains from the global
model, their updates are averaged into the next one, and sites measure it.
Every step is durable before the next begins, so a coordinator that was killed
takes the round up where it stood; a round record's state says where that is.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom_common.errors import TooFewUpdates
from fedloom_server.assignments import Assignments, Terms
from fedloom_server.codecs import most_update_bytes
from fedloom_server.cohorts import draw_cohort, wanted
from fedloom_server.config import KeepModels
from fedloom_server.downlink import delta_to
from fedloom_server.evaluation import SiteMetrics, combine
from fedloom_server.folding import Folding
from fedloom_server.meters import Meters
from fedloom_server.records import Assignment, AssignmentState, Round, RoundState, Run, Work, assignment_id
from fedloom_server.retention import drop_old_models
from fedloom_server.sites import Sites
from fedloom_server.stopping import RoundResult, stop_reason
from fedloom_server.store import Store
from fedloom_server.watching import RoundChange, Watching

ATTEMPT_PAUSE_S = 2.0  # sites that all failed at once are given a moment before they are asked again
CAUSES_TOLD = 20  # a round's reason is for people; every cause stands with its assignment

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What rounds work with."""

    store: Store
    sites: Sites
    assignments: Assignments
    watching: Watching
    meters: Meters
    keep_models: KeepModels


async def run_rounds(run: Run, federation: Federation) -> str:
    """Federated averaging: rounds until a stop condition holds; returns which.

    Raises:
        TooFewUpdates: a round failed in every attempt.
    Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
    """
    if run.spec.evaluation.initial and not federation.store.rounds(run.id):
        initial = _new_round(run, 0, RoundState.EVALUATING)
        initial.model_digest, initial.model_bytes = run.model_digest, run.model_bytes
        await _play(run, initial, federation)
    while (reason := _stop_reason(run, federation)) is None:
        await _play(run, _open_round(run, federation), federation)
    return reason


async def _play(run: Run, record: Round, federation: Federation) -> None:
    """One round from wherever it stands to its end."""
    if record.state in (RoundState.TRAINING, RoundState.AGGREGATING):
        folding = Folding(run, record, federation.store, federation.assignments)
        done = await _train(run, record, federation, folding)
        _advance(run, record, RoundState.AGGREGATING, federation)
        await _aggregate(run, record, done, federation, folding)
        _advance(run, record, RoundState.EVALUATING, federation)
    if record.state is RoundState.EVALUATING and _is_evaluated(run, record):
        await _evaluate(run, record, federation)
    record.ended_at_s = time.time()
    run.rounds_done = record.number
    _advance(run, record, RoundState.FINISHED, federation)
    federation.store.clear_spool()
    drop_old_models(federation.store, run, federation.keep_models)
    metrics = {name: round(value, 4) for name, value in record.metrics.items()}
    logger.info("round finished", extra={"run": run.id, "round": record.number, "metrics": metrics})


async def _train(run: Run, record: Round, federation: Federation, folding: Folding) -> list[Assignment]:
    """Assignments whose updates count, in cohort order, from the first attempt that meets the quorum."""
    cohort = run.spec.cohort
    while True:
        if not record.cohort:
            fitting = await _fitting(run, federation)
            record.cohort = list(
                await draw_cohort(run, record, fitting, store=federation.store, sites=federation.sites)
            )
        batch = _assignments(run, record, Work.TRAIN, record.cohort, federation)
        _advance(run, record, record.state, federation)
        terms = _terms(run, record.base_digest, federation, needed=cohort.needed)
        await folding.begin(batch)
        try:
            await federation.assignments.carry_out(run, batch, terms, folding.look)
        finally:
            await folding.end()
        done = [assignment for assignment in batch if assignment.state is AssignmentState.DONE]
        if len(done) >= cohort.needed:
            return done
        record.reason = _shortfall(record, batch, cohort.needed)
        logger.warning(
            "round attempt failed", extra={"run": run.id, "round": record.number, "reason": record.reason}
        )
        if record.attempt - record.first_attempt + 1 >= cohort.attempts:
            _advance(run, record, RoundState.FAILED, federation)
            raise TooFewUpdates(record.reason)
        record.attempt, record.cohort, record.sum_digest = record.attempt + 1, [], ""
        _advance(run, record, record.state, federation)
        federation.store.clear_spool()
        await asyncio.sleep(ATTEMPT_PAUSE_S)


async def _fitting(run: Run, federation: Federation) -> list[str]:
    """Connected sites that fit the run, as soon as they are enough."""
    spec = run.spec

    def tell(lacking: str) -> None:
        run.reason = f"waits for sites: {lacking}"
        logger.info("waiting for sites", extra={"run": run.id, "reason": run.reason})
        _save_run(run, federation)

    fitting = await federation.sites.wait_for(spec.cohort.min_sites, wanted(spec), tell)
    if run.reason:
        run.reason = ""
        _save_run(run, federation)
    return fitting


async def _aggregate(
    run: Run, record: Round, done: Sequence[Assignment], federation: Federation, folding: Folding
) -> None:
    """The next global model, durable under its digest, named by round and run."""
    published = await folding.aggregate(
        done, federation.store.spool.folder / f"{run.id}.{record.number}.model"
    )
    record.metrics = {f"train_{name}": value for name, value in _combined(done).items()}
    model, delta = published.model, published.delta
    record.model_digest, record.model_bytes, record.reason = model.digest, model.size_bytes, ""
    record.delta_digest, record.delta_bytes = (delta.file.digest, delta.file.size_bytes) if delta else ("", 0)
    run.model_digest, run.model_bytes, run.rounds_done = model.digest, model.size_bytes, record.number


async def _evaluate(run: Run, record: Round, federation: Federation) -> None:
    """Metrics of the round's model, by every connected site that fits the run."""
    batch = federation.store.assignments(run.id, record.number)
    batch = [assignment for assignment in batch if assignment.work is Work.EVALUATE]
    if not batch:
        if record.number == 0:
            await _fitting(run, federation)  # nobody may be there yet when a run begins
        sites = federation.sites.fitting(wanted(run.spec))
        batch = _assignments(run, record, Work.EVALUATE, sites, federation)
    terms = _terms(run, record.model_digest, federation, needed=0)
    _advance(run, record, record.state, federation)
    await federation.assignments.carry_out(run, batch, terms)
    done = [assignment for assignment in batch if assignment.state is AssignmentState.DONE]
    if done:
        record.metrics = record.metrics | _combined(done)
    else:
        logger.warning("no site evaluated the model", extra={"run": run.id, "round": record.number})


def _open_round(run: Run, federation: Federation) -> Round:
    """The round under way when the coordinator stopped, or the next one."""
    for record in federation.store.rounds(run.id):
        if record.state not in (RoundState.FINISHED, RoundState.FAILED):
            return record
    return _new_round(run, run.rounds_done + 1, RoundState.TRAINING)


def _new_round(run: Run, number: int, state: RoundState) -> Round:
    return Round(
        run_id=run.id, number=number, state=state, base_digest=run.model_digest, started_at_s=time.time()
    )


def _assignments(
    run: Run, record: Round, work: Work, sites: Sequence[str], federation: Federation
) -> list[Assignment]:
    """This attempt's assignments, in the order of ``sites``: those stored, and new ones for the rest."""
    digest = record.base_digest if work is Work.TRAIN else record.model_digest
    size = federation.store.files.path(digest).stat().st_size
    stored = {assignment.id: assignment for assignment in federation.store.assignments(run.id, record.number)}
    batch = []
    for site in sites:
        name = assignment_id(run.id, record.number, record.attempt, work, site)
        fresh = Assignment(
            id=name, run_id=run.id, round=record.number, attempt=record.attempt, work=work, site=site,
            model_digest=digest, model_bytes=size,
        )  # fmt: skip
        batch.append(stored.get(name, fresh))
    federation.store.save(run, record, *batch)
    return batch


def _terms(run: Run, model_digest: str, federation: Federation, *, needed: int) -> Terms:
    """What holds for all who start from a model."""
    cohort, store = run.spec.cohort, federation.store
    return Terms(
        needed=needed, deadline_s=cohort.deadline_s, stall_s=cohort.stall_s,
        most_update_bytes=most_update_bytes(run.spec.transport.up, store.files.path(model_digest)),
        delta=delta_to(store, run, model_digest),
    )  # fmt: skip


def _advance(run: Run, record: Round, state: RoundState, federation: Federation) -> None:
    """Make a step durable, and tell it."""
    record.state = state
    federation.store.save(run, record)
    if state in (RoundState.FINISHED, RoundState.FAILED):
        federation.meters.round_ended(record)
    federation.watching.tell(run.id, run)
    assignments = federation.store.assignments(run.id, record.number)
    federation.watching.tell(run.id, RoundChange(record, assignments))


def _save_run(run: Run, federation: Federation) -> None:
    federation.store.save(run)
    federation.watching.tell(run.id, run)


def _stop_reason(run: Run, federation: Federation) -> str | None:
    rounds = federation.store.finished_rounds(run.id)
    history = [RoundResult(number=record.number, metrics=record.metrics) for record in rounds]
    return stop_reason(run.spec, history, time.time() - run.started_at_s - run.paused_s)


def _is_evaluated(run: Run, record: Round) -> bool:
    every = run.spec.evaluation.every_rounds
    if record.number == 0:
        return True
    return bool(every) and (record.number % every == 0 or record.number == run.spec.rounds)


def _combined(done: Sequence[Assignment]) -> dict[str, float]:
    return combine(
        SiteMetrics(examples=assignment.examples, tokens=assignment.tokens, metrics=assignment.metrics)
        for assignment in done
    )


def _shortfall(record: Round, batch: Sequence[Assignment], needed: int) -> str:
    """What the quorum was, and each missing site's cause."""
    missing = [assignment for assignment in batch if assignment.state is not AssignmentState.DONE]
    missing.sort(key=lambda a: a.state is AssignmentState.CANCELLED)  # a consequence of the others
    causes = "; ".join(f"{a.site} {a.state}: {_first_line(a.reason)}" for a in missing[:CAUSES_TOLD])
    if len(missing) > CAUSES_TOLD:
        causes += f"; and {len(missing) - CAUSES_TOLD} more"
    good = len(batch) - len(missing)
    return f"round {record.number}: {good} of {len(batch)} sites reported, the quorum is {needed} ({causes})"


def _first_line(text: str) -> str:
    line, *rest = text.strip().splitlines() or [""]
    return f"{line[:300]} …" if rest or len(line) > 300 else line
