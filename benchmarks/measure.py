"""What a measurement reads of the kernel while it runs: processes' CPU time and memory, loopback's bytes."""

import contextlib
import os
import statistics
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

MB, GB, GIB = 10**6, 10**9, 1 << 30
SAMPLE_S = 0.1
RESCAN_S = 1.0  # between two looks for new child processes: reading all of /proc takes milliseconds

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


@dataclass(frozen=True)
class Spread:
    """Some repetitions of one figure."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median, smallest and largest; at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass
class _Group:
    """One process and its descendants."""

    root: int
    pids: set[int] = field(default_factory=set)
    cpu_s: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    high_bytes: list[int] = field(default_factory=list)
    """The highest peak, since its start, of any one process that lived at the time."""


class Sampler:
    """Reads the kernel's counters of groups of processes, ten times a second, while the block runs.

    Costs about 2% of a core. What is asked for lies between two times of ``time.time()``.
    """

    def __init__(self, roots: Mapping[str, int]) -> None:
        """``roots`` gives each group's name and the process whose descendants belong to it."""
        self._groups = {name: _Group(pid, {pid}) for name, pid in roots.items()}
        self._at_s: list[float] = []
        self._wire_bytes: list[int] = []
        self._busy_s: list[float] = []
        self._scanned_at_s = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def cpu_s(self, prefix: str, begin_s: float, end_s: float) -> float:
        """CPU seconds, user and system, that groups whose name begins so took between two times."""
        return sum(
            self._between(group.cpu_s, begin_s, end_s)
            for name, group in self._groups.items()
            if name.startswith(prefix)
        )

    def wire_bytes(self, begin_s: float, end_s: float) -> int:
        """Bytes that went over the loopback device, headers included."""
        return round(self._between(self._wire_bytes, begin_s, end_s))

    def others_cores(self, begin_s: float, end_s: float) -> float:
        """How many cores everything else on the machine kept busy on average."""
        ours_s = self.cpu_s("", begin_s, end_s)
        return max(0.0, (self._between(self._busy_s, begin_s, end_s) - ours_s) / (end_s - begin_s))

    def peak_bytes(self, prefix: str, begin_s: float, end_s: float) -> int:
        """The largest resident memory of any one group whose name begins so, in processes alive at the time.

        The kernel's own high-water mark where a group is one process; the largest sample for several.
        """
        first, last = bisect_left(self._at_s, begin_s), bisect_left(self._at_s, end_s) + 1
        return max(
            max(group.rss_bytes[first:last] + group.high_bytes[first:last])
            for name, group in self._groups.items()
            if name.startswith(prefix)
        )

    def _between(self, readings: Sequence[float], begin_s: float, end_s: float) -> float:
        return self._at(readings, end_s) - self._at(readings, begin_s)

    def _at(self, readings: Sequence[float], at_s: float) -> float:
        """A counter at a time, by the straight line between the samples around it."""
        after = min(bisect_left(self._at_s, at_s), len(self._at_s) - 1)
        if after == 0:
            return readings[0]
        before_s, after_s = self._at_s[after - 1], self._at_s[after]
        share = min(1.0, (at_s - before_s) / (after_s - before_s))
        return readings[after - 1] + share * (readings[after] - readings[after - 1])

    def _sample_until_stopped(self) -> None:
        while True:
            self._sample()
            if self._stopped.wait(SAMPLE_S):
                self._sample()
                return

    def _sample(self) -> None:
        now_s = time.time()
        if now_s - self._scanned_at_s > RESCAN_S:
            self._find_descendants()
            self._scanned_at_s = now_s
        for group in self._groups.values():
            facts = [_facts(pid) for pid in group.pids]
            # A process that has ended moves what it took to the parent that waited for it.
            group.cpu_s.append(sum(fact.cpu_s for fact in facts))
            group.rss_bytes.append(sum(fact.rss_bytes for fact in facts))
            group.high_bytes.append(max(fact.high_bytes for fact in facts))
        self._wire_bytes.append(_loopback_bytes())
        self._busy_s.append(_busy_s())
        self._at_s.append(now_s)

    def _find_descendants(self) -> None:
        children = defaultdict(list)
        for entry in _PROC.iterdir():
            if entry.name.isdigit() and (fields := _stat_fields(int(entry.name))):
                children[int(fields[1])].append(int(entry.name))
        for group in self._groups.values():
            group.pids, grown = {group.root}, [group.root]
            while grown:
                grown = [child for pid in grown for child in children[pid]]
                group.pids.update(grown)


@dataclass(frozen=True)
class _Facts:
    cpu_s: float
    rss_bytes: int
    high_bytes: int


def _facts(pid: int) -> _Facts:
    fields = _stat_fields(pid)
    if not fields:
        return _Facts(0.0, 0, 0)
    high_bytes = 0
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                high_bytes = int(line.split()[1]) << 10
    cpu_s = sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S  # its own and its ended children's
    return _Facts(cpu_s, int(fields[21]) * _PAGE_BYTES, high_bytes)


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; nothing if the process is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _busy_s() -> float:
    """CPU seconds of all cores since the machine started, waiting left out."""
    user, nice, system, _, _, *interrupts = (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:8]
    return sum(int(ticks) for ticks in (user, nice, system, *interrupts)) / _TICKS_PER_S


def _loopback_bytes() -> int:
    for line in (_PROC / "net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0
