"""One trial: an arm, a seed and learning rates become a result. And which trials an experiment needs."""

import asyncio
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from fedloom_client.config import DataSource
from fedloom_common.runspec import RunSpec
from fedloom_common.runspec.evaluation import CENTRAL_PREFIX
from fedloom_server.records import Assignment, AssignmentState, Run, Work
from learning.arms import OWN, Arm, Rates, Setting, measuring_spec, run_spec
from learning.federation import Federation, Sites, TrialFailed
from learning.results import Point, Result, Results, best


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms that are compared."""

    name: str
    title: str
    setting: Setting
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    """Learning rates are tuned on the first."""
    unit: str = "token"
    """What a loss is the mean over."""
    topics: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Arms to be seen side by side, by what they are to show; all in one plot if none are given."""

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)


async def run_experiment(
    experiment: Experiment, federation: Federation, data: Sites, results: Results
) -> None:
    """Do the trials without a result: grids on the first seed, then each arm's best rates on every seed.

    Several processes may do so at the same time with the same results: each trial is done by one of them.
    """
    sites, data_digest = tuple(sorted(own_sets(data))), digest_of_data(data)

    def trial(arm: Arm, seed: int, rates: Rates) -> Trial:
        return Trial(
            experiment=experiment, arm=arm, seed=seed, rates=rates, sites=sites, data_digest=data_digest
        )

    chosen, tried = dict[str, Rates](), list[Result]()
    for is_later in (False, True):  # then the arms that take a rate over
        grids = {
            arm.name: [trial(arm, experiment.seeds[0], rates) for rates in grid_of(arm, chosen)]
            for arm in experiment.arms
            if bool(arm.rates_of) is is_later
        }
        await _do_all([one for grid in grids.values() for one in grid], federation, results)
        chosen |= {name: _best(grid, results).rates for name, grid in grids.items()}
        tried += [one.blank for grid in grids.values() for one in grid]
    each = [(arm, seed) for arm in experiment.arms for seed in experiment.seeds[: arm.seeds]]
    last = [trial(arm, seed, chosen[arm.name]) for arm, seed in each]
    await _do_all(last, federation, results)
    results.settle(experiment.name, [*tried, *(one.blank for one in last)])


def grid_of(arm: Arm, chosen: Mapping[str, Rates]) -> list[Rates]:
    """The learning rates that an arm is tuned on, with the ``chosen`` ones of the arm that it follows."""
    local = (chosen[arm.rates_of].local,) if arm.rates_of else arm.rates
    return [Rates(local=rate, server=server) for rate, server in product(local, arm.server_rates)]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An arm with a seed and learning rates."""

    experiment: Experiment
    arm: Arm
    seed: int
    rates: Rates
    sites: tuple[str, ...]
    """Those that have the data, and measure what comes of them."""
    data_digest: str

    @cached_property
    def spec(self) -> RunSpec:
        """The run that it is."""
        return run_spec(self.experiment.setting, self.arm, self.rates, self.seed, self.sites)

    @cached_property
    def blank(self) -> Result:
        """Its result before there is one."""
        return Result(
            experiment=self.experiment.name,
            arm=self.arm.name,
            seed=self.seed,
            lr=self.rates.local,
            server_lr=self.rates.server,
            key=key_of(self.spec, self.experiment.setting, self.arm, self.data_digest),
        )

    async def do(self, federation: Federation) -> Result:
        """What comes of it."""
        began_s = time.monotonic()
        federation.workbench.dropout = self.arm.dropout
        try:
            run = await federation.train(self.spec)
            federation.workbench.dropout = 0.0
            measuring = measuring_spec(self.experiment.setting, self.spec)
            overall, by_site = await federation.measure(run, measuring)
        except TrialFailed as error:
            return replace(self.blank, failed=str(error)[:300], seconds=time.monotonic() - began_s)
        return replace(
            self.blank,
            metrics=overall,
            sites=by_site,
            seconds=time.monotonic() - began_s,
            model_bytes=run.model_bytes,
            **_counts(federation, run, self.spec),
        )


async def _do_all(trials: Sequence[Trial], federation: Federation, results: Results) -> None:
    """Do what nobody has done; then wait for what others do, and do it where they gave up."""
    for wait in (False, True):
        for trial in trials:
            if results.find(trial.blank) is not None:
                continue
            claim = await asyncio.to_thread(results.claim, trial.blank, wait=wait)
            if claim is None:
                continue
            with claim:
                if results.find(trial.blank) is None:  # nor has anybody meanwhile
                    done = results.twin(trial.blank) or await trial.do(federation)
                    results.add(_told(done, trial.experiment.setting.metric))


def _told(result: Result, metric: str) -> Result:
    figure = result.failed or f"{metric} {result.metrics.get(metric, float('nan')):.4f}"
    name = f"{result.arm:24} seed {result.seed}  lr {result.rates}"
    print(f"  {name}  {figure}  {result.seconds:.0f} s", flush=True)
    return result


def _best(grid: Sequence[Trial], results: Results) -> Result:
    setting = grid[0].experiment.setting
    done = [found for trial in grid if (found := results.find(trial.blank)) is not None]
    return best(done, setting.metric, higher_is_better=setting.higher_is_better)


def key_of(spec: RunSpec, setting: Setting, arm: Arm, data_digest: str) -> str:
    """Changes whenever the trial would be another one."""
    content = spec.model_dump(mode="json")
    if spec.model.path is not None:
        content["model"]["path"] = Path(spec.model.path).name  # wherever it lies
    facts = [content, setting.final_examples, arm.dropout, data_digest]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def own_sets(data: Sites) -> dict[str, DataSource]:
    """What each site has of its own, of which everything else is made."""
    return {site: sets[OWN] for site, sets in data.items() if OWN in sets}


def digest_of_data(data: Sites) -> str:
    """Changes whenever a file of some site's data does."""
    digest = hashlib.sha256()
    for site, source in sorted(own_sets(data).items()):
        digest.update(f"{site} {source.format} {source.held_out}".encode())
        for pattern in source.files:
            for path in sorted(Path(pattern).parent.glob(Path(pattern).name)):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _counts(federation: Federation, run: Run, spec: RunSpec) -> dict[str, Any]:
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
                      wire_bytes=so_far.up + so_far.down, metrics=_by_sites(record.metrics))
            )  # fmt: skip
    return {
        "curve": points,
        "local_steps": steps,
        "steps": steps * spec.rounds,
        "tokens": so_far.tokens,
        "bytes_up": so_far.up,
        "bytes_down": so_far.down,
    }


def _by_sites(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """What the sites measured of a model, also where one machine trains it."""
    central = {
        name.removeprefix(CENTRAL_PREFIX): value
        for name, value in metrics.items()
        if name.startswith(CENTRAL_PREFIX)
    }
    return central or metrics


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
