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

from fedloom_common.errors import TooFewUpdates
from fedloom_common.runspec.evaluation import TRAIN_PREFIX
from fedloom_server.batches import evaluations, still_late, terms_of_evaluation, terms_of_training, trainings
from fedloom_server.central import Central
from fedloom_server.closing import measure_last
from fedloom_server.evaluation import combined
from fedloom_server.failures import FAILURES_KEPT, failure_of_attempt
from fedloom_server.federation import Federation
from fedloom_server.folding import Folding
from fedloom_server.measuring import initial_round, is_measured_now, tell_round, told_by
from fedloom_server.pending import sites_done
from fedloom_server.records import Assignment, AssignmentState, Base, Round, RoundState, Run
from fedloom_server.retention import drop_old_models
from fedloom_server.stopping import stop_reason

ATTEMPT_PAUSE_S = 2.0  # sites that all failed at once are given a moment before they are asked again
CAUSES_TOLD = 20  # a round's reason is for people; every cause stands with its assignment

logger = logging.getLogger(__name__)


async def run_rounds(run: Run, federation: Federation) -> str:
    """Federated averaging: rounds until a stop condition holds; returns which.

    Raises:
        TooFewSites: fewer are connected than the next round needs.
        TooFewUpdates: a round failed in every attempt; called again, it is tried as often again.
    Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
    """
    if run.spec.evaluation.initial and not federation.store.rounds(run.id):
        await _play(run, initial_round(run), federation)
    elif (begun := _round_begun(run, federation)) is not None and begun.cohort:
        await _play(run, begun, federation)  # stop conditions are for the ends of rounds
    central = Central(run, federation)
    try:
        while True:
            while (reason := _stop_reason(run, federation)) is None:
                record = _round_begun(run, federation)
                central.begin(run.rounds_done)
                await _play(run, record or _new_round(run, run.rounds_done + 1), federation)
                await central.settled()
            central.begin(run.rounds_done, is_last=True)
            news = [await measure_last(run, federation), await central.settled()]
            if not any(news):
                return reason  # else the last model may have given it reason to go on
    finally:
        await central.leave()


async def _play(run: Run, record: Round, federation: Federation) -> None:
    """One round from wherever it stands to its end."""
    if record.state in (RoundState.TRAINING, RoundState.AGGREGATING):
        folding = Folding(run, record, federation.store, federation.assignments.uploads)
        done, late = await _train(run, record, federation, folding)
        measured = told_by(run, done, federation.store)
        _advance(run, record, RoundState.AGGREGATING, federation, *late, *measured)
        for earlier in measured:
            tell_round(run, earlier, federation)
        await _aggregate(run, record, done, folding)
        _advance(run, record, RoundState.EVALUATING, federation)
    if record.state is RoundState.EVALUATING and is_measured_now(run.spec, record.number):
        await _evaluate(run, record, federation)
    record.ended_at_s = time.time()
    run.rounds_done = record.number
    _advance(run, record, RoundState.FINISHED, federation)
    federation.store.trim_failures(run.id, FAILURES_KEPT)
    federation.store.clear_spool(run.id)
    drop_old_models(federation.store, run, federation.keep_models)
    metrics = {name: round(value, 4) for name, value in record.metrics.items()}
    logger.info("round finished", extra={"run": run.id, "round": record.number, "metrics": metrics})


async def _train(
    run: Run, record: Round, federation: Federation, folding: Folding
) -> tuple[list[Assignment], list[Assignment]]:
    """Trainings whose updates count, and late ones, of the first attempt that brings enough."""
    cohort = run.spec.cohort
    while True:
        batch = await trainings(run, record, federation)
        _advance(run, record, record.state, federation)
        terms = terms_of_training(run, record, batch, federation)
        await folding.begin(batch)
        try:
            await federation.assignments.carry_out(run, batch, terms, folding.look)
        finally:
            await folding.end()
        if sites_done(batch) >= cohort.needed:
            late = [assignment for assignment in batch if assignment.is_late]  # some may have come just now
            done = [assignment for assignment in batch if assignment.state is AssignmentState.DONE]
            return [assignment for assignment in done if not assignment.is_late], late
        record.reason = _shortfall(record, batch, cohort.needed)
        federation.meters.attempt_failed()
        logger.warning(
            "round attempt failed", extra={"run": run.id, "round": record.number, "reason": record.reason}
        )
        is_last = record.attempt - record.first_attempt + 1 >= cohort.attempts
        _begin_attempt(run, record, batch, federation, starts_count=is_last)
        if is_last:
            raise TooFewUpdates(record.reason)
        await asyncio.sleep(ATTEMPT_PAUSE_S)


def _begin_attempt(
    run: Run, record: Round, batch: Sequence[Assignment], federation: Federation, *, starts_count: bool
) -> None:
    """Leave a failed attempt behind, with all that came of it but late updates of earlier rounds."""
    late = still_late(batch)
    failure = failure_of_attempt(record)
    record.attempt, record.cohort, record.target, record.sum_digest = record.attempt + 1, [], 0, ""
    if starts_count:
        record.first_attempt = record.attempt
    _advance(run, record, record.state, federation, failure, *late)
    federation.store.trim_failures(run.id, FAILURES_KEPT)
    federation.store.clear_spool(run.id)


async def _aggregate(run: Run, record: Round, done: Sequence[Assignment], folding: Folding) -> None:
    """The next global model, durable under its digest, named by round and run."""
    published = await folding.aggregate(done)
    record.metrics = {TRAIN_PREFIX + name: value for name, value in combined(done).items()}
    model, delta = published.model, published.delta
    record.model_digest, record.model_bytes, record.reason = model.digest, model.size_bytes, ""
    record.optimizer_digest = published.optimizer_digest
    record.delta_digest, record.delta_bytes = (delta.file.digest, delta.file.size_bytes) if delta else ("", 0)
    record.adapter = published.parts.to_json() if published.parts else {}
    run.model_digest, run.model_bytes, run.rounds_done = model.digest, model.size_bytes, record.number


async def _evaluate(run: Run, record: Round, federation: Federation) -> None:
    """Metrics of the round's model."""
    batch = await evaluations(run, record, federation)
    _advance(run, record, record.state, federation)
    await federation.assignments.carry_out(run, batch, terms_of_evaluation(run, record, federation))
    done = [assignment for assignment in batch if assignment.state is AssignmentState.DONE]
    if done:
        record.metrics = record.metrics | combined(done)
    else:
        logger.warning("no site evaluated the model", extra={"run": run.id, "round": record.number})


def _round_begun(run: Run, federation: Federation) -> Round | None:
    """The round that has yet to end; its cohort is empty between two attempts."""
    return next(iter(federation.store.unfinished_rounds(run.id)), None)


def _new_round(run: Run, number: int) -> Round:
    return Round(
        run_id=run.id, number=number, state=RoundState.TRAINING, base_digest=run.model_digest,
        started_at_s=time.time(),
    )  # fmt: skip


def _advance(run: Run, record: Round, state: RoundState, federation: Federation, *more: Base) -> None:
    """Make a step durable, and tell it."""
    record.state = state
    federation.store.save(run, record, *more)
    if state is RoundState.FINISHED:
        federation.meters.round_ended(record)
    federation.watching.tell(run.id, run)
    tell_round(run, record, federation)


def _stop_reason(run: Run, federation: Federation) -> str | None:
    history = federation.store.history(run.id)
    return stop_reason(run.spec, history, time.time() - run.started_at_s - run.paused_s)


def _shortfall(record: Round, batch: Sequence[Assignment], needed: int) -> str:
    """What the quorum was, and each cause with the sites that are missing for it."""
    missing = [assignment for assignment in batch if assignment.state is not AssignmentState.DONE]
    missing.sort(key=lambda a: a.state is AssignmentState.CANCELLED)  # a consequence of the others
    sites: dict[str, list[str]] = {}
    for assignment in missing[:CAUSES_TOLD]:
        sites.setdefault(f"{assignment.state}: {_first_line(assignment.reason)}", []).append(assignment.site)
    causes = "; ".join(f"{', '.join(names)} {cause}" for cause, names in sites.items())
    if len(missing) > CAUSES_TOLD:
        causes += f"; and {len(missing) - CAUSES_TOLD} more"
    good = len(batch) - len(missing)
    return f"round {record.number}: {good} of {len(batch)} sites reported, the quorum is {needed} ({causes})"


def _first_line(text: str) -> str:
    line, *rest = text.strip().splitlines() or [""]
    return f"{line[:300]} …" if rest or len(line) > 300 else line
