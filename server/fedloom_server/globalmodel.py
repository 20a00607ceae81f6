"""From what a round's updates come to, to the model that sites are told: a server step, then the way down."""

from dataclasses import replace
from pathlib import Path

from fedloom_server.downlink import Published, publish
from fedloom_server.optimizers import learning_rate, optimizer_for
from fedloom_server.records import Round, Run
from fedloom_server.serverstep import Step, take_step
from fedloom_server.store import Store


def make_model(store: Store, run: Run, record: Round, centre: Path) -> Published:
    """Make a round's centre the next global model; ``centre`` is used up.

    Doing it again, after a kill and with the same centre, gives the same bytes, model and state.

    Raises:
        BadTensor: the model or the optimizer's state is not finite, or a codec has no code for the change.
    """
    optimizer = optimizer_for(run.spec.aggregation.server_optimizer)
    if optimizer is None:
        return publish(store, run, record, centre)
    before = _state_before(store, run, record)
    step = Step(
        optimizer=optimizer, rate=learning_rate(run.spec, record.number), centre=centre,
        base=store.files.path(record.base_digest), state=store.files.path(before) if before else None,
    )  # fmt: skip
    model, state = centre.with_suffix(".stepped"), centre.with_suffix(".optimizer")
    take_step(step, model, state)
    model.replace(centre)
    return replace(publish(store, run, record, centre), optimizer=store.files.put(state))


def _state_before(store: Store, run: Run, record: Round) -> str:
    """The digest of what the round before left, by its row: it is the one that made the base model."""
    if record.number == 1:
        return run.optimizer_digest
    before = store.round(run.id, record.number - 1)
    assert before is not None, "it made the base"
    return before.optimizer_digest
