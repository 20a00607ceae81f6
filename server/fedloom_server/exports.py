"""A run's model for the outside: which files, and a card of the facts behind it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedloom_common.errors import NotFound
from fedloom_server.adapters.parts import Parts, parts_of
from fedloom_server.best import best_of, final_round
from fedloom_server.card import CardFacts, SiteFacts, model_card
from fedloom_server.evaluation import before_of
from fedloom_server.models import MODEL_FILE
from fedloom_server.records import Assignment, AssignmentState, Round, Run, Work
from fedloom_server.stopping import RoundResult
from fedloom_server.store import Store


@dataclass(frozen=True)
class Export:
    """The files of a model directory, by name, digest and size_bytes, and its card."""

    run: Run
    files: list[dict[str, Any]]
    parts: Parts
    """What makes the model, if its file is an adapter."""
    card: str
    round: int
    """The round that the model came of; 0 for the initial one."""


def export(
    store: Store, run_id: str, round_number: int | Literal["best"] | None, *, as_adapter: bool = False
) -> Export:
    """A run's final model, or the one after a round, or the best; round 0 is the initial model.

    Raises:
        NotFound: there is no such run or round, or its model is no longer kept, or none is measured yet.
    """
    run = store.run(run_id)
    history = store.history(run.id)
    best = best_of(run.spec, history)
    if round_number == "best":
        round_number = _require_measured(run, best).number
    elif round_number is None:
        final = final_round(run, history)
        round_number = None if final == run.rounds_done else final
    rounds = rounds_up_to(store, run, round_number)
    digest = kept_model(store, run, rounds)
    size = rounds[-1].model_bytes if rounds else run.model_bytes
    model = {"name": MODEL_FILE, "digest": digest, "size_bytes": size}
    parts = parts_of(store, run, digest)
    facts = _facts(run, rounds, store.assignments(run.id), best)
    if parts.frozen:
        facts = replace(facts, base_digest=parts.base_digest(), is_adapter=as_adapter)
    return Export(run, [model, *run.assets], parts, model_card(facts), facts.rounds_done)


def rounds_up_to(store: Store, run: Run, round_number: int | None) -> list[Round]:
    """A run's rounds that have a model, up to one of them or to the latest.

    Raises:
        NotFound: that round has no model.
    """
    rounds = [record for record in store.rounds(run.id) if record.model_digest]
    if round_number is None:
        return rounds
    until = [record for record in rounds if record.number <= round_number]
    if not until or until[-1].number != round_number:
        numbers = ", ".join(str(record.number) for record in rounds) or "none yet"
        raise NotFound(f"run {run.id} has no model of round {round_number}; it has {numbers}")
    return until


def kept_model(store: Store, run: Run, rounds: Sequence[Round]) -> str:
    """Digest of the model after the last of a run's rounds; without rounds, of the initial one.

    Raises:
        NotFound: it is no longer kept.
    """
    number, digest = (rounds[-1].number, rounds[-1].model_digest) if rounds else (0, run.model_digest)
    if store.files.has(digest):
        return digest
    models = {record.number: record.model_digest for record in store.rounds(run.id) if record.model_digest}
    kept = ", ".join(str(number) for number, name in models.items() if store.files.has(name))
    raise NotFound(
        f"run {run.id} no longer keeps the model of round {number}; it keeps those of {kept or 'none'} "
        "(keep_models in coordinator.yaml says which)"
    )


def _require_measured(run: Run, best: RoundResult | None) -> RoundResult:
    if best is None:
        raise NotFound(
            f"no model of run {run.id} is measured by {run.spec.goal.metric} yet, so none is the best; "
            "give a round"
        )
    return best


def _facts(
    run: Run, rounds: Sequence[Round], assignments: Sequence[Assignment], best: RoundResult | None
) -> CardFacts:
    last = rounds[-1].number if rounds else 0
    final_attempts = {(record.number, record.attempt) for record in rounds}
    counted = [
        a
        for a in assignments
        if a.state is AssignmentState.DONE and (a.round, a.attempt) in final_attempts and not a.is_late
    ]
    reason = run.reason if run.state.is_end else ""
    if reason and last != run.rounds_done:
        is_best = best is not None and best.number == last
        which = f"its best model by {run.spec.goal.metric}, " if is_best else ""
        reason += f"; this is {which}that of round {last}"
    mine, by_site = _by_site(counted), _by_site(assignments)
    names = mine.keys() - set(run.spec.evaluation.central)
    return CardFacts(
        run_id=run.id,
        spec=run.spec,
        rounds_done=last,
        reason=reason,
        sites=[_site(name, mine[name], _latest_measured(by_site[name], last)) for name in sorted(names)],
        history=[RoundResult(number=record.number, metrics=record.metrics) for record in rounds],
    )


def _by_site(assignments: Sequence[Assignment]) -> dict[str, list[Assignment]]:
    found = defaultdict(list)
    for assignment in assignments:
        found[assignment.site].append(assignment)
    return found


def _site(name: str, counted: Sequence[Assignment], measured: Mapping[str, float]) -> SiteFacts:
    trained = [assignment for assignment in counted if assignment.work is Work.TRAIN]
    return SiteFacts(
        site=name,
        rounds=len(trained),
        examples=sum(a.examples for a in trained),
        tokens=sum(a.tokens for a in trained),
        loss=measured.get("loss"),
        perplexity=measured.get("perplexity"),
    )


def _latest_measured(assignments: Sequence[Assignment], last: int) -> Mapping[str, float]:
    """What their site measured of the latest model that it has measured, of those up to round ``last``.

    By an evaluation, or before it trained: then in the round after the model's.
    """
    latest: Mapping[str, float] = {}
    number = 0
    for assignment in assignments:
        if assignment.state is not AssignmentState.DONE:
            continue
        before = before_of(assignment) if assignment.work is Work.TRAIN else None
        if assignment.work is Work.EVALUATE and number <= assignment.round <= last:
            latest, number = assignment.metrics, assignment.round
        elif before is not None and number <= assignment.base_round <= last:
            latest, number = before.metrics, assignment.base_round
    return latest
