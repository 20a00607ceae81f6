"""When a run that could not go on is tried again: by its sites, and with longer and longer pauses."""

from collections.abc import Mapping

from fedloom_server.roster import Link

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
PAUSES_WITHOUT_NEWS = 10  # without any sign of a change a run is tried again after so many of its pauses


class Wait:
    """A run's wait for its sites, from one failure on.

    A site that attached since may have been mended, so the run goes on soon; but no sooner than after a
    pause that doubles with each failure in a row, since a site may come back and fail at once for ever.
    """

    def __init__(self, *, min_sites: int, sessions: Mapping[str, Link], failures: int, now_s: float) -> None:
        """``sessions`` are those of the run's sites now; ``failures`` in a row, 0 if sites are too few."""
        self._min_sites = min_sites
        self.is_for_sites = not failures
        """Whether it is over as soon as enough sites are connected."""
        self._sessions = dict(sessions)
        pause_s = min(FIRST_PAUSE_S * 2 ** min(failures - 1, 30), LONGEST_PAUSE_S) if failures else 0.0
        self._soon_at_s = now_s + pause_s
        self._anyway_at_s = now_s + PAUSES_WITHOUT_NEWS * pause_s

    def is_over(self, sessions: Mapping[str, Link], now_s: float) -> bool:
        """Whether to try again, with the sessions that the run's sites have now."""
        if len(sessions) < self._min_sites:
            return False
        if now_s >= self._anyway_at_s:
            return True
        return now_s >= self._soon_at_s and any(
            self._sessions.get(name) is not link for name, link in sessions.items()
        )

    def text(self, now_s: float) -> str:
        """What ends the wait, for people."""
        after_s = max(0.0, self._anyway_at_s - now_s)
        return f"goes on when a site attaches again, or after {after_s:.0f} s, with {self._min_sites} or more"
