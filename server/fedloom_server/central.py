"""Measurements by sites of the operator's own, beside the rounds (evaluation.central)."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from fedloom_common.runspec.evaluation import CENTRAL_PREFIX
from fedloom_server.batches import assigned, terms_of_evaluation
from fedloom_server.evaluation import combined
from fedloom_server.federation import Federation
from fedloom_server.measuring import is_due, tell_round
from fedloom_server.records import Assignment, AssignmentState, Round, Run, Work

logger = logging.getLogger(__name__)


class Central:
    """Has a run's models measured one after the other, each while others train from it."""

    def __init__(self, run: Run, federation: Federation, on_end: Callable[[], None] = lambda: None) -> None:
        """``on_end`` is called when a measurement has ended."""
        self._run, self._federation, self._on_end = run, federation, on_end
        self._measuring: asyncio.Task[bool] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a model is being measured."""
        return self._measuring is not None and not self._measuring.done()

    def begin(self, number: int, *, is_last: bool = False) -> None:
        """Begin to measure a round's model, if it is due, or if it is the last and any is; not while busy."""
        evaluation = self._run.spec.evaluation
        due = is_due(self._run.spec, number) or (is_last and bool(evaluation.every_rounds))
        if evaluation.central and due:
            if self._measuring is not None:
                self._measuring.result()  # nobody waited for it; an error of it ends the work as any other
            self._measuring = asyncio.create_task(self._measure(number), name="central evaluation")

    async def settled(self) -> bool:
        """Wait until the measurement has ended; whether it told anything new."""
        measuring, self._measuring = self._measuring, None
        return await measuring if measuring is not None else False

    async def leave(self) -> None:
        """Wait for nothing any more; what is open in the store stays so, to be taken up again."""
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.gather(self._measuring, return_exceptions=True)

    async def _measure(self, number: int) -> bool:
        store, run = self._federation.store, self._run
        record = store.round(run.id, number)
        if record is None or any(name.startswith(CENTRAL_PREFIX) for name in record.metrics):
            return False
        await store.files.bring(record.model_digest)
        batch = self._batch(record)
        terms = replace(terms_of_evaluation(run, record, self._federation), elapsed_s=0.0)
        await self._federation.assignments.carry_out(run, batch, terms)
        done = [assignment for assignment in batch if assignment.state is AssignmentState.DONE]
        record = store.round(run.id, number)
        assert record is not None, "rounds stay"
        if not done:
            logger.warning("no central site measured the model", extra={"run": run.id, "round": number})
            return False
        record.metrics |= {CENTRAL_PREFIX + name: value for name, value in combined(done).items()}
        store.save(record)
        tell_round(run, record, self._federation)
        self._on_end()
        return True

    def _batch(self, record: Round) -> list[Assignment]:
        """What was asked before, else a measurement by each central site that is there and has the data."""
        run, sites = self._run, self._federation.sites
        central = run.spec.evaluation.central
        stored = [
            a
            for a in self._federation.store.assignments(run.id, record.number)
            if a.work is Work.EVALUATE and a.site in central
        ]
        there = [name for name in central if sites.link(name) and sites.data_bytes(name, run.spec.data)]
        return stored or assigned(run, record, Work.EVALUATE, there, self._federation)
