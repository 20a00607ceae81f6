"""Which sites of an asynchronous run train next: those that fit, have nothing to do and are in good shape."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fedloom_common.errors import TooFewUpdates
from fedloom_server.batches import require_sites
from fedloom_server.clock import now_s
from fedloom_server.cohorts import wanted
from fedloom_server.federation import Federation
from fedloom_server.records import Assignment, AssignmentState, Run
from fedloom_server.roster import Link
from fedloom_server.rounds import CAUSES_TOLD
from fedloom_server.selection import Draw, known_weights, pick
from fedloom_server.versions import Versions

REST_S = 2.0  # after a site's first failure; twice as long after each further one in a row
LONGEST_REST_S = 300.0
MOST_FAILURES = 3  # in a row, of every site that is here: then the run waits, and others have its place
_BLAMELESS = (AssignmentState.DONE, AssignmentState.CANCELLED)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Rest:
    """A site that failed is not asked for a while: others take its place, and nobody spins."""

    failures: int
    """In a row."""
    until_s: float
    link: Link | None
    """The session in which it failed: in a new one it may be mended."""
    why: str


class IdleSites:
    """Chooses among the sites of one run, and says what it waits for."""

    def __init__(self, run: Run, federation: Federation) -> None:
        self._run, self._spec, self._federation = run, run.spec, federation
        self._sites, self._wanted = federation.sites, wanted(run.spec)
        self._rests: dict[str, _Rest] = {}

    def fitting(self, *, has_begun: bool) -> list[str]:
        """Connected sites that fit the run; none before it begins while they are too few."""
        sites = self._sites.fitting(self._wanted)
        return sites if has_begun or len(sites) >= self._spec.cohort.min_sites else []

    def pick(
        self, sites: Sequence[str], busy: Collection[str], free: int, versions: Versions
    ) -> Sequence[str]:
        """At most ``free`` of the sites, none that is busy, by the run's policy.

        Raises:
            BadSpec: the policy is not there, or picks other than it was asked to.
        """
        idle = tuple(site for site in sites if site not in busy and not self._rests_now(site))
        if not idle or free <= 0:
            return ()
        draw = Draw(
            sites=idle,
            count=min(free, len(idle)),
            seed=self._spec.seed,
            round=versions.trainings,
            attempt=1,
            weights=known_weights(
                idle, versions.examples, {s: self._sites.data_bytes(s, self._spec.data) for s in idle}
            ),
            last_picked=versions.turns,
        )
        return pick(draw, self._spec.cohort.policy)

    def note(self, assignment: Assignment) -> None:
        """A site's work has ended: one that failed gets none for a while."""
        site, before = assignment.site, self._rests.pop(assignment.site, None)
        if assignment.state in _BLAMELESS:
            return
        failures = 1 + (before.failures if before else 0)
        rest_s = min(REST_S * 2 ** (failures - 1), LONGEST_REST_S)
        why = f"{site} {assignment.state}: {assignment.reason}"
        self._rests[site] = _Rest(
            failures=failures, until_s=now_s() + rest_s, link=self._sites.link(site), why=why
        )

    def rest_s(self) -> float | None:
        """Seconds until some site may be asked again; None if none rests."""
        ends = [rest.until_s for site, rest in self._rests.items() if self._rests_now(site)]
        return max(0.0, min(ends) - now_s()) if ends else None

    def tell(self, *, is_busy: bool) -> None:
        """Say why nobody works for the run, if sites rest.

        Raises:
            TooFewSites: nobody works for it, and nobody who fits is here.
            TooFewUpdates: nor does anybody, as all who are here have failed time and again.
        """
        run, reason = self._run, "" if is_busy else self._why_all_rest()
        if run.reason == reason:
            return
        run.reason = reason
        self._federation.store.save(run)
        self._federation.watching.tell(run.id, run)
        if reason:
            logger.info("waiting for sites", extra={"run": run.id, "reason": reason})

    def _why_all_rest(self) -> str:
        resting = [rest for site, rest in sorted(self._rests.items()) if self._rests_now(site)]
        if not resting:
            require_sites(self._run, self._sites)
            return ""
        why = "; ".join(rest.why for rest in resting[:CAUSES_TOLD])
        if all(rest.failures >= MOST_FAILURES for rest in resting):
            raise TooFewUpdates(f"every site has failed {MOST_FAILURES} times or more in a row ({why})")
        return f"waits a while after failures: {why}"

    def _rests_now(self, site: str) -> bool:
        """Whether a site that is here is to be left alone."""
        rest, link = self._rests.get(site), self._sites.link(site)
        return rest is not None and now_s() < rest.until_s and link is not None and link is rest.link
