"""Results as files: one JSON line a trial, which appears whole, and is not done again."""

import fcntl
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Self

from learning.arms import Rates


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model on the way."""

    round: int
    steps: int
    """Optimizer steps of each site so far."""
    tokens: int
    """Trained on by all sites so far."""
    wire_bytes: int
    """Models down and updates up, of all sites so far."""
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a trial."""

    experiment: str
    arm: str
    seed: int
    lr: float
    server_lr: float | None
    key: str
    """Digest of the run spec, the data and the setting: a result is used again as long as it stays."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the final model, over all sites' held-out data."""
    sites: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same at each site."""
    curve: list[Point] = field(default_factory=list)
    local_steps: int = 0
    steps: int = 0
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    model_bytes: int = 0
    seconds: float = 0.0
    failed: str = ""
    """Why there is no model, such as a loss that was not finite."""

    @property
    def rates(self) -> Rates:
        """The trial's learning rates."""
        return Rates(local=self.lr, server=self.server_lr)

    @property
    def wire_bytes(self) -> int:
        """Both ways, all sites."""
        return self.bytes_up + self.bytes_down

    def figure(self, metric: str, *, higher_is_better: bool = False) -> float:
        """The metric of the final model; the worst there is if the trial failed."""
        worst = -math.inf if higher_is_better else math.inf
        return worst if self.failed else self.metrics.get(metric, worst)


class Results:
    """The results in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, blank: Result) -> Result | None:
        """What a trial came to, if it was done with the same spec and data."""
        path = self._path(blank)
        if not path.exists():
            return None
        result = _read(path.read_text())
        return result if result.key == blank.key else None

    def twin(self, blank: Result) -> Result | None:
        """What the same trial came to in another experiment."""
        name = self._path(blank).name
        for path in sorted(self._folder.glob(f"*/*/{name}")):
            if (found := _read(path.read_text())).key == blank.key:
                return replace(found, experiment=blank.experiment, arm=blank.arm)
        return None

    def claim(self, blank: Result, *, wait: bool) -> "Claim | None":
        """Keep a trial from other processes; None if one has it, unless asked to ``wait`` for its end."""
        path = self._path(blank)
        path.parent.mkdir(parents=True, exist_ok=True)
        return Claim.of(path.with_name(f".{path.name}.claim"), wait=wait)

    def add(self, result: Result) -> None:
        """Write a result, whole or not at all."""
        path = self._path(result)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, line_of(result))

    def take_over(self, others: Iterable[Result]) -> None:
        """Add results of trials that were not done here."""
        for result in others:
            if not self._path(result).exists():
                self.add(result)

    def begin(self, experiment: str) -> None:
        """Have an experiment's results told of only when its present trials are done."""
        self._trials(experiment).unlink(missing_ok=True)

    def settle(self, experiment: str, trials: Iterable[Result]) -> None:
        """Say which trials the experiment has now: no report tells of another's, such as of other data."""
        names = {str(self._path(trial).relative_to(self._folder)): trial.key for trial in trials}
        write_whole(self._trials(experiment), json.dumps(names, indent=1, sort_keys=True) + "\n")

    def of(self, experiment: str) -> list[Result]:
        """Those of the trials that an experiment was settled with, in the order of their names."""
        trials = self._trials(experiment)
        names: dict[str, str] = json.loads(trials.read_text()) if trials.exists() else {}
        found = (_read((self._folder / name).read_text()) for name in sorted(names))
        return [result for result, key in zip(found, map(names.get, sorted(names)), strict=True)
                if result.key == key]  # fmt: skip

    def _trials(self, experiment: str) -> Path:
        return self._folder / f"{experiment}.trials.json"

    def _path(self, result: Result) -> Path:
        folder = self._folder / result.experiment / result.arm
        return folder / f"seed{result.seed}-lr{result.rates}.json"


class Claim:
    """A lock file, which goes with the block or with the process, however it ends."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path, self._file = path, file

    @classmethod
    def of(cls, path: Path, *, wait: bool) -> Self | None:
        """The claim, as soon as it may be had; None if it may not and one is not to ``wait``."""
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return cls(path, file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)  # before it is free: who waits for it looks for the result first
        self._file.close()


def write_whole(path: Path, text: str) -> None:
    """Write a file, or leave what is there: several processes do so."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def line_of(result: Result) -> str:
    """A result as a line of JSON."""
    return json.dumps(asdict(result), sort_keys=True) + "\n"


def read_lines(text: str) -> list[Result]:
    """Results of a file of lines."""
    return [_read(line) for line in text.splitlines() if line.strip()]


def best(results: Iterable[Result], metric: str, *, higher_is_better: bool = False) -> Result:
    """The one with the best figure; of ties the first."""
    listed = list(results)
    sign = -1 if higher_is_better else 1
    return min(listed, key=lambda r: sign * r.figure(metric, higher_is_better=higher_is_better))


def _read(line: str) -> Result:
    content = json.loads(line)
    return Result(**content | {"curve": [Point(**point) for point in content["curve"]]})
