"""The updates of a round as its rule takes them: where they lie, and what each counts.

A clipped update's norm stands with its assignment, so that the running median is durable with the rows.
Without any norm of an earlier round, as in the first one, the median is that of the round's own updates:
then all must be there before one can count.
"""

from collections.abc import Sequence
from dataclasses import replace

from fedloom_common.runspec import Sync
from fedloom_server.aggregation import BaseModel, Update, staleness_factor
from fedloom_server.aggregation.norms import change_norm, clip_factor, longest_change
from fedloom_server.records import Assignment, Round, Run
from fedloom_server.results import update_weight
from fedloom_server.store import Store


class Updates:
    """What the updates of one round count."""

    def __init__(self, run: Run, record: Round, store: Store) -> None:
        self._run, self._record, self._store = run, record, store
        self._clip = run.spec.aggregation.clip
        self._longest: float | None = None
        if self._clip is not None:
            norms = store.update_norms(run.id, record.number - self._clip.rounds, record.number)
            self._longest = longest_change(norms, self._clip.factor) if norms else None

    @property
    def count_together(self) -> bool:
        """Whether what one counts depends on all of the round."""
        return self._clip is not None and self._longest is None

    def measure(self, assignments: Sequence[Assignment]) -> list[Assignment]:
        """Write its update's norm to each assignment that lacks one, where they are clipped; gives these, to
        be saved.

        Raises:
            BadTensor: an update cannot be measured; the message names its site.
        """
        if self._clip is None:
            return []
        measured = [assignment for assignment in assignments if not assignment.update_norm]
        base, digest = self._store.files.path(self._record.base_digest), self._record.base_digest
        for assignment in measured:
            update = self._unclipped(assignment)
            assignment.update_norm = change_norm(update, base, self._run.spec.transport.up, digest)
        return measured

    def of(self, assignments: Sequence[Assignment]) -> list[Update]:
        """Updates that are measured, with what they count."""
        updates = [self._unclipped(assignment) for assignment in assignments]
        if self._clip is None:
            return updates
        longest, norms = self._longest, [assignment.update_norm for assignment in assignments]
        if longest is None:
            longest = longest_change(norms, self._clip.factor)
        factors = [clip_factor(norm, longest) for norm in norms]
        return [replace(update, clip=factor) for update, factor in zip(updates, factors, strict=True)]

    def models(self, assignments: Sequence[Assignment]) -> list[BaseModel]:
        """The model that each update began from."""
        return [self._model(assignment) for assignment in assignments]

    def _unclipped(self, assignment: Assignment) -> Update:
        """An update with what it counts by age; of a stale one the model that it began from is needed too."""
        update = Update(
            site=assignment.site,
            path=self._store.spool.update_path(assignment),
            examples=update_weight(self._run.spec.task, assignment),
            factor=self._factor(assignment.staleness),
        )
        return replace(update, base=self._model(assignment)) if assignment.staleness else update

    def _model(self, assignment: Assignment) -> BaseModel:
        digest = assignment.model_digest
        return BaseModel(path=self._store.files.path(digest), digest=digest)

    def _factor(self, staleness: int) -> float:
        mode = self._run.spec.mode
        if isinstance(mode, Sync):
            return staleness_factor(staleness, self._run.spec.cohort.staleness.exponent)
        return mode.server_lr * staleness_factor(staleness, mode.staleness.exponent)
