"""What each site measured of each round's model, out of the messages that tell it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from fedloom.v1.runs_pb2 import Round, SiteRound
from fedloom.v1.session_pb2 import Work
from fedloom_common.errors import NotFound
from fedloom_server.console.formats import FittingTable, metric_text, plain


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one site measured of one model."""

    round: int
    """The round that made the model; 0 for the initial one."""
    site: str
    is_central: bool
    examples: int
    metrics: Mapping[str, float]


def measured(rounds: Iterable[Round]) -> Iterator[Told]:
    """Every measurement by a site of a run's models, as far as it counts."""
    for item in rounds:
        for work in item.sites:
            if work.state == "done" and work.HasField("before"):
                before = work.before
                yield _told(work, work.before_round, before.examples, before.metrics)
            if work.state == "done" and work.work == Work.WORK_EVALUATE:
                yield _told(work, item.number, work.examples, work.metrics)


def by_site(rounds: Iterable[Round]) -> dict[str, dict[int, Told]]:
    """The latest measurement of each model by each site, sites and rounds in order."""
    found: dict[str, dict[int, Told]] = {}
    for told in measured(rounds):
        found.setdefault(told.site, {})[told.round] = told
    return {site: dict(sorted(found[site].items())) for site in sorted(found)}


def sites_table(rounds: Iterable[Round], metric: str) -> Table:
    """One line a round, one column a site: what each measured of the model after the round."""
    rounds = list(rounds)
    told = by_site(rounds)
    names = [f"{site} (central)" if _is_central(found) else site for site, found in told.items()]
    table = FittingTable(">round", ">all sites", *(f">{plain(name)}" for name in names))
    for item in rounds:
        cells = [found.get(item.number) for found in told.values()]
        if not any(cells):
            continue
        values = (None if cell is None else cell.metrics.get(metric) for cell in cells)
        table.add_row(
            str(item.number), metric_text(item.metrics.get(metric)), *(Text(metric_text(v)) for v in values)
        )
    return table


def require_measured(metric: str, rounds: Iterable[Round]) -> None:
    """Check a metric that was asked for, if one was.

    Raises:
        NotFound: sites have measured others only.
    """
    known = sorted({name for told in measured(rounds) for name in told.metrics})
    if metric and known and metric not in known:
        raise NotFound(f"no site has measured {metric!r}; --metric can be {', '.join(known)}")


def sites_data(rounds: Iterable[Round]) -> dict[str, object]:
    """Every site's metrics by round, for scripts."""
    return {
        site: {
            "is_central": _is_central(found),
            "rounds": {
                str(number): {"examples": told.examples, "metrics": dict(told.metrics)}
                for number, told in found.items()
            },
        }
        for site, found in by_site(rounds).items()
    }


def _is_central(found: Mapping[int, Told]) -> bool:
    return any(told.is_central for told in found.values())


def _told(work: SiteRound, number: int, examples: int, metrics: Mapping[str, float]) -> Told:
    return Told(
        round=number, site=work.site, is_central=work.is_central, examples=examples, metrics=dict(metrics)
    )
