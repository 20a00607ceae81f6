"""What the coordinator counts while it works, for /metrics; no rule depends on it.

A label has few values: states, the contract's methods, and sites, of which the first thousand have a series
of their own.
"""

from importlib.metadata import version
from platform import python_version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fedloom_server.records import Assignment, AssignmentState, Round, RoundState, Work

SITES_TOLD = 1000
OTHER_SITES = "(other)"
ROUND_BUCKETS_S = (1, 5, 15, 60, 300, 900, 1800, 3600, 7200, 14400, 43200, 86400)


class Meters:
    """Counters since the process began."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._sites: set[str] = set()
        self._rounds = Counter(
            "fedloom_rounds", "Rounds that have ended, by how.", ["end"], registry=self.registry
        )
        for end in (RoundState.FINISHED, RoundState.FAILED):
            self._rounds.labels(str(end))
        self._failed_attempts = Counter(
            "fedloom_failed_attempts", "Attempts at a round that brought too few updates.",
            registry=self.registry,
        )  # fmt: skip
        self._round_seconds = Histogram(
            "fedloom_round_duration_seconds", "Time from a round's begin to its finish.",
            buckets=ROUND_BUCKETS_S, registry=self.registry,
        )  # fmt: skip
        self._assignments = Counter(
            "fedloom_assignments", "Assignments that have ended, by work and how.", ["work", "end"],
            registry=self.registry,
        )  # fmt: skip
        for work in Work:  # from the start: a series that begins at 1 hides its first increase
            for state in AssignmentState:
                if state is not AssignmentState.OPEN:
                    self._assignments.labels(str(work), str(state))
        self._received = Counter(
            "fedloom_update_received_bytes", "Bytes of updates that came, by site.", ["site"],
            registry=self.registry,
        )  # fmt: skip
        self._sent = Counter(
            "fedloom_model_sent_bytes", "Bytes of models that went out, by site.", ["site"],
            registry=self.registry,
        )  # fmt: skip
        Gauge(
            "fedloom_build_info", "The release that runs; always 1.", ["version", "python_version"],
            registry=self.registry,
        ).labels(version("fedloom"), python_version()).set(1)  # fmt: skip

    def round_ended(self, record: Round) -> None:
        """A round is finished or has failed."""
        self._rounds.labels(str(record.state)).inc()
        if record.state is RoundState.FINISHED:
            self._round_seconds.observe(max(0.0, record.ended_at_s - record.started_at_s))

    def attempt_failed(self) -> None:
        """A round begins anew, or waits."""
        self._failed_attempts.inc()

    def assignment_ended(self, assignment: Assignment) -> None:
        """An assignment has ended."""
        self._assignments.labels(str(assignment.work), str(assignment.state)).inc()

    def received(self, site: str, count_bytes: int) -> None:
        """Bytes of an update have come from a site."""
        self._received.labels(self._label(site)).inc(count_bytes)

    def sent(self, site: str, count_bytes: int) -> None:
        """Bytes of a model went to a site."""
        self._sent.labels(self._label(site)).inc(count_bytes)

    def _label(self, site: str) -> str:
        if site not in self._sites:
            if len(self._sites) >= SITES_TOLD:
                return OTHER_SITES
            self._sites.add(site)
        return site
