"""A run's model for the outside: which files, and a card of the facts behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedloom_common.errors import NotFound
from fedloom_server.adapters.parts import Parts, parts_of
from fedloom_server.card import CardFacts, SiteFacts, model_card
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


def export(store: Store, run_id: str, round_number: int | None, *, as_adapter: bool = False) -> Export:
    """A run's latest model, or the one after a round; round 0 is the initial model.

    Raises:
        NotFound: there is no such run or round, or its model is no longer kept.
    """
    run = store.run(run_id)
    rounds = rounds_up_to(store, run, round_number)
    digest = kept_model(store, run, rounds)
    size = rounds[-1].model_bytes if rounds else run.model_bytes
    model = {"name": MODEL_FILE, "digest": digest, "size_bytes": size}
    parts = parts_of(store, run, digest)
    facts = _facts(run, rounds, store.assignments(run.id))
    if parts.frozen:
        facts = replace(facts, base_digest=parts.base_digest(), is_adapter=as_adapter)
    return Export(run, [model, *run.assets], parts, model_card(facts))


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


def _facts(run: Run, rounds: Sequence[Round], assignments: Sequence[Assignment]) -> CardFacts:
    last = rounds[-1].number if rounds else 0
    final_attempts = {(record.number, record.attempt) for record in rounds}
    counted = [
        a
        for a in assignments
        if a.state is AssignmentState.DONE and (a.round, a.attempt) in final_attempts and not a.is_late
    ]
    whole = last == run.rounds_done
    return CardFacts(
        run_id=run.id,
        spec=run.spec,
        rounds_done=last,
        reason=run.reason if whole and run.state.is_end else "",
        sites=[_site(name, counted) for name in sorted({assignment.site for assignment in counted})],
        history=[RoundResult(number=record.number, metrics=record.metrics) for record in rounds],
    )


def _site(name: str, counted: Sequence[Assignment]) -> SiteFacts:
    trained = [a for a in counted if a.site == name and a.work is Work.TRAIN]
    measured = [a for a in counted if a.site == name and a.work is Work.EVALUATE]
    latest = measured[-1].metrics if measured else {}
    return SiteFacts(
        site=name,
        rounds=len(trained),
        examples=sum(a.examples for a in trained),
        tokens=sum(a.tokens for a in trained),
        loss=latest.get("loss"),
        perplexity=latest.get("perplexity"),
    )
