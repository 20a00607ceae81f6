"""``fedloom run report``: for each site, was it worth joining?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedloom.v1.runs_pb2 import Round, Run, SiteRound
from fedloom.v1.session_pb2 import Work
from fedloom_common.runspec import Goal, read_run_spec
from fedloom_common.runspec.evaluation import TRAIN_PREFIX
from fedloom_server.console.formats import FittingTable, count_text, metric_text, plain
from fedloom_server.console.measured import Told, by_site

NOT_ASKED = "the run asked for no training alone (evaluation.alone)"


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """What the run was to one site; a number that nobody measured is None."""

    site: str
    rounds: int
    """Rounds to which its updates counted."""
    data_examples: int
    """Training examples that its data make."""
    data_share: float | None
    """Its part of all sites' training examples."""
    held_out_examples: int
    """On which the metrics stand."""
    initial: float | None
    alone: float | None
    """The model that it trained by itself."""
    federated: float | None
    """The run's final model."""
    gain: float | None
    """How much better the federated model is than the one alone."""
    why_not: str
    """Why there is no gain to tell; empty if there is."""

    @property
    def worth_joining(self) -> bool | None:
        """Whether the federation's model is better for it than its own."""
        return None if self.gain is None else self.gain > 0


def site_reports(run: Run, rounds: Sequence[Round], goal: Goal) -> list[SiteReport]:
    """One for each site whose updates counted, by name."""
    told, works = by_site(rounds), _works_by_site(rounds)
    trained = {site: found for site, found in works.items() if _counted(site, rounds)}
    data = {site: max(work.data_examples for work in found) for site, found in trained.items()}
    everybody = sum(data.values())
    return [
        _site_report(
            site, run, goal, told.get(site, {}), trained[site],
            rounds=_counted(site, rounds), share=(data[site], everybody),
        )
        for site in sorted(trained)
    ]  # fmt: skip


def goal_of(run: Run, metric: str = "") -> Goal:
    """By what the report judges: a metric if one is given, else what the run's best model is told by.

    Of a metric that central sites measure it takes what each site measures itself, and of what training
    tells the loss: that is of no model's held-out part, and sites keep their own best model by the loss too.
    """
    goal = read_run_spec(run.spec_json).own_goal
    if goal.metric.startswith(TRAIN_PREFIX):
        goal = Goal()
    return Goal(metric=metric) if metric and metric != goal.metric else goal


def report_view(run: Run, reports: Sequence[SiteReport], goal: Goal) -> RenderableType:
    """One line a site."""
    table = FittingTable(
        "site", ">rounds", ">share of data", ">held-out\nexamples", ">initial", ">alone", ">federated",
        ">gain", "worth joining",
    )  # fmt: skip
    for site in reports:
        share = "–" if site.data_share is None else f"{site.data_share:.1%}"
        numbers = (site.initial, site.alone, site.federated, site.gain)
        table.add_row(
            Text(plain(site.site)), str(site.rounds), share, count_text(site.held_out_examples),
            *(Text(metric_text(number)) for number in numbers), _verdict(site),
        )  # fmt: skip
    side = "higher" if goal.higher_is_better else "lower"
    about = f"{plain(goal.metric)} on each site's held-out part, {side} is better; "
    about += f"federated is the model of round {run.final_round}"
    return Group(Text(about, style="dim"), Text(), table)


def report_data(run: Run, reports: Sequence[SiteReport], goal: Goal) -> dict[str, Any]:
    """The report for scripts."""
    sites = [asdict(site) | {"worth_joining": site.worth_joining} for site in reports]
    return {
        "run": run.id, "metric": goal.metric, "higher_is_better": goal.higher_is_better,
        "final_round": run.final_round, "sites": sites,
    }  # fmt: skip


def _site_report(
    site: str,
    run: Run,
    goal: Goal,
    told: Mapping[int, Told],
    works: Sequence[SiteRound],
    *,
    rounds: int,
    share: tuple[int, int],
) -> SiteReport:
    mine, everybody = share
    alone = [work for work in works if work.work == Work.WORK_ALONE]
    own = _metric(alone[-1].metrics, goal) if alone and alone[-1].state == "done" else None
    initial, final = (told.get(number) for number in (0, run.final_round))
    federated = _metric(final.metrics, goal) if final else None
    gain = None
    if own is not None and federated is not None:
        gain = federated - own if goal.higher_is_better else own - federated
    return SiteReport(
        site=site,
        rounds=rounds,
        data_examples=mine,
        data_share=mine / everybody if mine else None,
        held_out_examples=final.examples if final else 0,
        initial=_metric(initial.metrics, goal) if initial else None,
        alone=own,
        federated=federated,
        gain=gain,
        why_not="" if gain is not None else _why_not(alone, final, goal),
    )


def _why_not(alone: Sequence[SiteRound], final: Told | None, goal: Goal) -> str:
    if not alone:
        return NOT_ASKED
    if alone[-1].state != "done":
        return f"alone: {alone[-1].state}" + (f", {alone[-1].reason}" if alone[-1].reason else "")
    if final is None:
        return "it has not measured the final model"
    return f"it does not measure {goal.metric}"


def _metric(metrics: Mapping[str, float], goal: Goal) -> float | None:
    return metrics.get(goal.metric)


def _works_by_site(rounds: Iterable[Round]) -> dict[str, list[SiteRound]]:
    found: dict[str, list[SiteRound]] = {}
    for item in rounds:
        for work in item.sites:
            found.setdefault(work.site, []).append(work)
    return found


def _counted(site: str, rounds: Iterable[Round]) -> int:
    """How many of a site's updates are in the model."""
    return sum(
        (work.site, work.work, work.state, work.attempt) == (site, Work.WORK_TRAIN, "done", item.attempt)
        and not work.is_late
        for item in rounds
        if item.HasField("model")
        for work in item.sites
    )


def _verdict(site: SiteReport) -> Text:
    if site.gain is None or site.alone is None:
        return Text(f"not known: {plain(site.why_not)}", style="yellow")
    part = f" ({abs(site.gain / site.alone):.1%})" if site.alone else ""
    by = f", by {metric_text(abs(site.gain))}{part}"
    if site.worth_joining:
        return Text(f"yes{by}", style="green")
    return Text(f"no{by}" if site.gain else "no, it makes no difference", style="red")
