"""How long a batch of assignments is waited for, and who of them is lost meanwhile."""

import asyncio
import math
from collections.abc import Callable, Sequence

from fedloom_server.clock import now_s
from fedloom_server.pending import Pending, Terms, sites_done, sites_possible
from fedloom_server.records import Assignment, AssignmentState
from fedloom_server.sites import RETURN_S

End = Callable[[Pending, AssignmentState, str], None]


class Patience:
    """Waits until nobody of a batch is waited for any more, and ends those who are silent or too late."""

    def __init__(
        self,
        batch: Sequence[Assignment],
        opened: Sequence[Pending],
        terms: Terms,
        *,
        end: End,
        is_held_up: Callable[[Pending], bool],
        is_connected: Callable[[str], bool],
    ) -> None:
        """``end`` ends an assignment; ``is_held_up`` says that its silence is no fault of its site."""
        self._batch, self._opened, self._terms = batch, opened, terms
        self._end, self._is_held_up, self._is_connected = end, is_held_up, is_connected
        self._deadline_at_s = now_s() + _left_s(terms)

    async def until_over(self) -> None:
        """Return when every assignment has ended, enough are done, or time is up."""
        while still := [entry for entry in self._opened if not entry.ended.done()]:
            reason = self._why_no_longer(still)
            if reason is not None:
                self._go_on_without(still, reason)
                return
            alive_until_s = min(entry.alive_at_s for entry in still) + self._terms.stall_s
            wake_at_s = min(self._deadline_at_s, alive_until_s)
            timeout_s = None if math.isinf(wake_at_s) else max(0.0, wake_at_s - now_s())
            await asyncio.wait(
                [entry.ended for entry in still], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            self._lose_silent()

    def _why_no_longer(self, still: Sequence[Pending]) -> str | None:
        """Why those who are still at work are not waited for; None while they are."""
        terms, done, possible = self._terms, sites_done(self._batch), sites_possible(self._batch)
        only_late = terms.carries_late and all(entry.assignment.staleness for entry in still)
        is_over = terms.carries_late and now_s() >= self._deadline_at_s
        if possible < terms.needed:
            return f"{terms.needed} results are needed and only {possible} can still come"
        if terms.target and done >= terms.target:
            return f"{done} results have come, and no more are waited for"
        if done < terms.needed:
            return self._too_late if only_late and is_over else None
        if only_late:
            return "only late updates are missing, and the round goes on without them"
        return self._too_late if is_over else None

    def _go_on_without(self, entries: Sequence[Pending], reason: str) -> None:
        """What is still open becomes late, if it is of use to later rounds, and ends otherwise.

        What was late before is of use whatever becomes of this attempt.
        """
        is_enough = sites_done(self._batch) >= self._terms.needed
        for entry in entries:
            if self._terms.carries_late and (is_enough or entry.assignment.staleness):
                entry.assignment.is_late = True
            else:
                self._end(entry, AssignmentState.CANCELLED, reason)

    def _lose_silent(self) -> None:
        at_s, terms = now_s(), self._terms
        is_over = at_s >= self._deadline_at_s
        if is_over and terms.carries_late and sites_done(self._batch) >= terms.needed:
            return  # they are late, not lost
        for entry in self._opened:
            if entry.ended.done():
                continue
            if self._is_held_up(entry):
                entry.alive_at_s = at_s
            if is_over and terms.carries_late and entry.assignment.staleness:
                continue  # it may join the next attempt
            if is_over:
                self._lose(entry, self._too_late)
            elif at_s >= entry.alive_at_s + terms.stall_s:
                self._lose(entry, f"no progress for {terms.stall_s:g} s")

    @property
    def _too_late(self) -> str:
        return f"not finished by the deadline of {self._terms.deadline_s:g} s"

    def _lose(self, entry: Pending, reason: str) -> None:
        is_connected = self._is_connected(entry.assignment.site)
        self._end(entry, AssignmentState.LOST, entry.why_lost(reason, is_connected=is_connected))


def _left_s(terms: Terms) -> float:
    """Seconds until the deadline; after a restart sites have time to come back with what they finished."""
    if terms.deadline_s is None:
        return math.inf
    return max(terms.deadline_s - terms.elapsed_s, min(terms.deadline_s, RETURN_S))
