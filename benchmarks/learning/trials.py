"""One trial: an arm, a seed and learning rates become a result. And which trials an experiment needs."""

import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from fedloom_common.runspec import RunSpec
from fedloom_server.records import Assignment, AssignmentState, Run, Work
from learning.arms import Arm, Rates, Setting, measuring_spec, run_spec
from learning.federation import Federation, Sites, TrialFailed
from learning.results import Point, Result, Results, best

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms that are compared."""

    name: str
    title: str
    setting: Setting
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    """Learning rates are tuned on the first."""

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)


async def run_experiment(
    experiment: Experiment, federation: Federation, data_digest: str, results: Results
) -> None:
    """Do the trials without a result: each arm's grid on the first seed, its best rates on the others."""
    chosen: dict[str, Rates] = {}
    for arm in experiment.arms:
        trials = _Trials(experiment, arm, federation, data_digest, results)
        grid = [chosen[arm.rates_of]] if arm.rates_of else grid_of(arm)
        tuned = [await trials.result(experiment.seeds[0], rates) for rates in grid]
        setting = experiment.setting
        chosen[arm.name] = best(tuned, setting.metric, higher_is_better=setting.higher_is_better).rates
        for seed in experiment.seeds[1 : arm.seeds]:
            await trials.result(seed, chosen[arm.name])


def grid_of(arm: Arm) -> list[Rates]:
    """The learning rates that an arm is tuned on."""
    return [Rates(local=local, server=server) for local, server in product(arm.rates, arm.server_rates)]


@dataclass(frozen=True)
class _Trials:
    experiment: Experiment
    arm: Arm
    federation: Federation
    data_digest: str
    results: Results

    async def result(self, seed: int, rates: Rates) -> Result:
        """What is known of a trial, or what comes of doing it now."""
        setting = self.experiment.setting
        spec = run_spec(setting, self.arm, rates, seed)
        names = (self.experiment.name, self.arm.name, seed, rates)
        key = key_of(spec, setting, self.arm, self.data_digest)
        if (known := self.results.find(*names, key)) is not None:
            return known
        blank = Result(
            experiment=self.experiment.name, arm=self.arm.name, seed=seed, lr=rates.local,
            server_lr=rates.server, key=key,
        )  # fmt: skip
        result = await self._do(spec, blank)
        self.results.add(result)
        figure = result.failed or f"{setting.metric} {result.metrics.get(setting.metric, float('nan')):.4f}"
        print(f"  {self.arm.name:24} seed {seed}  lr {rates}  {figure}  {result.seconds:.0f} s", flush=True)
        return result

    async def _do(self, spec: RunSpec, blank: Result) -> Result:
        began_s = time.monotonic()
        federation, setting = self.federation, self.experiment.setting
        federation.workbench.dropout = self.arm.dropout
        try:
            run = await federation.train(spec)
            federation.workbench.dropout = 0.0
            overall, by_site = await federation.measure(run, measuring_spec(setting, spec))
        except TrialFailed as error:
            facts = asdict(blank) | {"failed": str(error)[:300], "seconds": time.monotonic() - began_s}
            return Result(**facts)
        facts = asdict(blank) | {
            "metrics": overall,
            "sites": by_site,
            "seconds": time.monotonic() - began_s,
            "model_bytes": run.model_bytes,
        }
        return Result(**facts | _counts(federation, run, spec))


def key_of(spec: RunSpec, setting: Setting, arm: Arm, data_digest: str) -> str:
    """Changes whenever the trial would be another one."""
    facts = [spec.model_dump(mode="json"), setting.final_examples, arm.dropout, data_digest]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_data(sites: Sites) -> str:
    """Changes whenever a file of some site's data does."""
    digest = hashlib.sha256()
    for site, sets in sorted(sites.items()):
        for name, source in sorted(sets.items()):
            digest.update(f"{site} {name} {source.format} {source.held_out}".encode())
            for pattern in source.files:
                for path in sorted(Path(pattern).parent.glob(Path(pattern).name)):
                    digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _counts(federation: Federation, run: Run, spec: RunSpec) -> dict[str, object]:
    """Tokens, bytes and the curve, from the coordinator's own records."""
    assignments = federation.store.assignments(run.id)
    steps = spec.local.steps or 0
    points, so_far = [], _Sums()
    by_round: dict[int, list[Assignment]] = defaultdict(list)
    for assignment in assignments:
        by_round[assignment.round].append(assignment)
    for record in federation.store.rounds(run.id):
        so_far.add(by_round[record.number])
        if "loss" in record.metrics:
            points.append(
                Point(round=record.number, steps=record.number * steps, tokens=so_far.tokens,
                      wire_bytes=so_far.up + so_far.down, metrics=record.metrics)
            )  # fmt: skip
    return {
        "curve": points,
        "local_steps": steps,
        "steps": steps * spec.rounds,
        "tokens": so_far.tokens,
        "bytes_up": so_far.up,
        "bytes_down": so_far.down,
    }


@dataclass
class _Sums:
    tokens: int = 0
    up: int = 0
    down: int = 0

    def add(self, assignments: Iterable[Assignment]) -> None:
        for assignment in assignments:
            self.up, self.down = self.up + assignment.bytes_up, self.down + assignment.bytes_down
            if assignment.work is Work.TRAIN and assignment.state is AssignmentState.DONE:
                self.tokens += assignment.tokens
