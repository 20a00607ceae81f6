"""Which global models are kept, and the removal of all others.

What anybody still works with is never removed, whatever the policy says: the latest model of every
run, and of unfinished rounds and assignments the models that they start from, make or measure.
"""

import logging
import time
from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import Select, select, tuple_

from fedloom_common.runspec import RunSpec
from fedloom_server.adapters.parts import part_digests
from fedloom_server.best import ranked, restores_best
from fedloom_server.config import KeepModels
from fedloom_server.records import Assignment, AssignmentState, Round, RoundState, Run, RunState
from fedloom_server.references import named_by, part_digests_of, parts_among
from fedloom_server.stopping import RoundResult
from fedloom_server.store import Store

ORPHAN_S = 3600.0  # long enough for an operator who restores a database beside newer files to see it

logger = logging.getLogger(__name__)


def kept_rounds(spec: RunSpec, metrics: Mapping[int, Mapping[str, float]], keep: KeepModels) -> set[int]:
    """Numbers of the rounds whose model the policy keeps, of those with ``metrics``, which may be empty.

    Of a run that is to end with its best model this is kept whatever the policy says.
    """
    numbers = sorted(metrics)
    kept = set(numbers[-keep.last :])
    if keep.every:
        kept |= {number for number in numbers if number and number % keep.every == 0}
    best = ranked(spec, [RoundResult(number=number, metrics=metrics[number]) for number in numbers])
    return kept | {result.number for result in best[: max(keep.best, int(restores_best(spec)))]}


def drop_old_models(store: Store, run: Run, keep: KeepModels) -> None:
    """Remove a run's models that the policy does not keep, each with what came with it."""
    rounds = store.rounds(run.id)
    files = _files_of(run, rounds)
    kept = _kept_files(run, rounds, keep)
    old = {name for names in files.values() for name in names} - kept
    if old:
        store.files.remove(old - _in_use(store, old) - _of_other_runs(store, run, old))
    trim_cache(store)


async def bring_models(store: Store, run: Run) -> None:
    """Have on disk what a run's work needs; an object storage may hold all of it, and the disk none.

    Raises:
        NotFound: a model is not kept.
        StorageUnavailable: the object storage does not answer.
    """
    needed = named_by(store.database, *(query.where(Run.id == run.id) for query in _working()))
    needed |= part_digests(run)
    for record in store.rounds(run.id):
        if record.model_digest in needed | {run.model_digest}:
            needed |= part_digests(record)
    for digest in {run.model_digest, *needed} - {""}:
        if store.files.has(digest):  # a base that no training needs any more may be gone
            await store.files.bring(digest)


def trim_cache(store: Store) -> None:
    """Leave on disk what work under way needs, and more as far as there is room."""
    if not store.files.is_cache:
        return
    under_way = Run.state.not_in([state for state in RunState if state.is_end])
    latest = select(Run.model_digest).where(under_way)
    in_use = named_by(store.database, latest, *(query.where(under_way) for query in _working()))
    store.files.trim(in_use | part_digests_of(store.database, in_use))


def collect_orphans(store: Store, keep: KeepModels) -> None:
    """Remove files that no run keeps: a kill may come between a file and the row that was to name it.

    Not while the database is empty: it may be the wrong one.
    """
    runs = store.runs()
    wanted = {run.model_digest for run in runs} | {file["digest"] for run in runs for file in run.assets}
    for run in runs:
        wanted |= part_digests(run)
        wanted |= _kept_files(run, store.rounds(run.id), keep)
    before_s = time.time() - ORPHAN_S
    found = {file.digest for file in store.files.all() if file.written_at_s < before_s} - wanted
    orphans = found - _in_use(store, found) if runs else set()
    store.files.remove(orphans)
    trim_cache(store)
    if orphans:
        logger.info("files that no run keeps are removed", extra={"files": len(orphans)})


def _kept_files(run: Run, rounds: Sequence[Round], keep: KeepModels) -> set[str]:
    """Digests of what the policy keeps of a run."""
    files = _files_of(run, rounds)
    measured = {record.number: record.metrics for record in rounds}
    metrics = {number: measured.get(number, {}) for number in files}
    kept = kept_rounds(run.spec, metrics, keep)
    if run.spec.evaluation.alone and run.state is not RunState.FINISHED:  # it may yet be resumed
        kept |= {min(files)} if files else set()  # from there each site trains alone at the end
    return {name for number in kept for name in files[number]} | {run.model_digest}


def _files_of(run: Run, rounds: Sequence[Round]) -> dict[int, set[str]]:
    """Of each round with a model, the model, the change that told it and the optimizer's state after it.

    The initial ones are of round 0.
    """
    files = {
        record.number: {
            record.model_digest,
            record.delta_digest,
            record.optimizer_digest,
            *part_digests(record),
        }
        for record in rounds
        if record.model_digest
    }
    if rounds:
        first = rounds[0].number - 1 if rounds[0].number else 0
        files.setdefault(first, {rounds[0].base_digest}).add(run.optimizer_digest)
    return {number: names - {""} for number, names in files.items()}


def _in_use(store: Store, digests: Collection[str]) -> set[str]:
    """Those that a run, an unfinished round or an assignment works with, whatever is kept."""
    in_use = named_by(store.database, select(Run.model_digest), *_working())
    return (in_use | part_digests_of(store.database, in_use)).intersection(digests)


def _working() -> list[Select[str]]:
    """Queries for what unfinished rounds and assignments start from, make or measure, and for the state of
    the optimizer that the next round goes on from."""
    unfinished = Round.state.not_in((RoundState.FINISHED, RoundState.FAILED))
    begun = select(Round.run_id, Round.number).join(Run, Run.id == Round.run_id).correlate(None)
    begun = begun.where(Round.number > Run.rounds_done)
    yet_to_count = (  # asked one by one, as each has an index of its own
        Assignment.state == AssignmentState.OPEN,
        Assignment.is_late,
        tuple_(Assignment.run_id, Assignment.round).in_(begun),
    )
    columns = (Round.base_digest, Round.model_digest, Round.delta_digest)
    state = select(Round.optimizer_digest).join(Run, Run.id == Round.run_id)
    states = [
        state.where(Round.number == Run.rounds_done),
        select(Run.optimizer_digest).where(Run.rounds_done == 0),
    ]
    of_rounds = [select(column).join(Run, Run.id == Round.run_id).where(unfinished) for column in columns]
    of_assignments = select(Assignment.model_digest).join(Run, Run.id == Assignment.run_id)
    return [*of_rounds, *states, *(of_assignments.where(condition) for condition in yet_to_count)]


def _of_other_runs(store: Store, run: Run, digests: Collection[str]) -> set[str]:
    """Those that other runs name too: runs of one spec begin with the same model."""
    columns = (Round.base_digest, Round.model_digest, Round.delta_digest, Round.optimizer_digest)
    named = named_by(
        store.database,
        select(Run.optimizer_digest).where(Run.id != run.id, Run.optimizer_digest.in_(digests)),
        *(select(column).where(Round.run_id != run.id, column.in_(digests)) for column in columns),
    )
    return named | parts_among(store.database, digests, besides=run.id)
