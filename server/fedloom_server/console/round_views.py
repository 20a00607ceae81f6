"""What the commands show of rounds and of each site's work in them, and nothing else.

Strings in these messages come from sites: they pass ``plain`` and go into
Text objects, so that they are shown and never obeyed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedloom.v1.runs_pb2 import Round, RoundState, Run, SiteRound
from fedloom.v1.session_pb2 import Work
from fedloom_common.runspec.evaluation import TRAIN_PREFIX
from fedloom_server.console.formats import (
    FittingTable,
    bytes_text,
    count_text,
    duration_text,
    enum_word,
    metric_text,
    plain,
    seconds_text,
)

ROUND_STYLE = {
    RoundState.ROUND_STATE_TRAINING: "cyan",
    RoundState.ROUND_STATE_AGGREGATING: "magenta",
    RoundState.ROUND_STATE_EVALUATING: "blue",
    RoundState.ROUND_STATE_FINISHED: "green",
    RoundState.ROUND_STATE_FAILED: "red",
}
SITE_STYLE = {"open": "cyan", "done": "green", "cancelled": "dim"}
TROUBLE_STYLE = "red"


def rounds_table(rounds: Sequence[Round], now_s: float, run: Run | None = None) -> Table:
    """One line a round, with every metric by the name that run specs use; what is best stands out."""
    names = _metric_names(rounds)
    headers = [f">{plain(name)}".replace("_", "_\n") for name in names]
    unit = "version" if any(map(is_version, rounds)) else "round"
    kept = {f"{TRAIN_PREFIX}loss", "loss", run.best_metric if run else ""}
    less = [header[1:] for name, header in reversed([*zip(names, headers, strict=True)]) if name not in kept]
    table = FittingTable(
        f">{unit}", "state", ">sites", ">examples", *headers, ">down", ">up", ">time",
        optional=[*less, "up", "down", "examples", "sites"],
    )  # fmt: skip
    for item in rounds:
        metrics = [_metric(item, name) for name in names]
        is_best = run is not None and run.HasField("best_round") and run.best_round == item.number
        if run is not None and is_best and run.best_metric in names:
            metrics[names.index(run.best_metric)].stylize("bold green")
        table.add_row(
            round_name(item),
            round_state(item),
            _sites_done(item),
            count_text(sum(work.examples for work in _main_work(item) if _counts(work))),
            *metrics,
            bytes_text(sum(work.bytes_down for work in item.sites)),
            bytes_text(sum(work.bytes_up for work in item.sites)),
            duration_text(item.started_at_s, item.ended_at_s, now_s),
        )
    return table


def round_view(item: Round, now_s: float) -> RenderableType:
    """One round with each site's work in it."""
    behind = [">behind"] if is_version(item) else []
    table = FittingTable(
        "site",
        "work",
        "state",
        *behind,
        ">examples",
        ">tokens",
        ">loss",
        ">down",
        ">up",
        "seconds by phase",
        "why",
    )
    for work in item.sites:
        table.add_row(
            Text(plain(work.site)),
            enum_word(Work.DESCRIPTOR, work.work),
            site_state(work),
            *([f"{work.staleness}" if work.turn else ""] if behind else []),
            count_text(work.examples),
            count_text(work.tokens),
            _metric(work, "loss"),
            bytes_text(work.bytes_down),
            bytes_text(work.bytes_up),
            Text(
                plain(
                    ", ".join(
                        f"{phase} {seconds:.1f}" for phase, seconds in sorted(work.phase_seconds.items())
                    )
                )
            ),
            Text(plain(work.reason)),
        )
    return Group(rounds_table([item], now_s), Text(), table)


def totals_table(rounds: Iterable[Round]) -> Table:
    """One line a site: what it did in all rounds, and its latest losses."""
    totals: dict[str, _Totals] = {}
    for item in rounds:
        for work in sorted(item.sites, key=lambda work: work.work):  # a measurement after trainings
            totals.setdefault(work.site, _Totals()).add(work)
    table = FittingTable(
        "site",
        ">trained",
        ">examples",
        ">tokens",
        ">train loss",
        ">held-out loss",
        ">down",
        ">up",
        ">train time",
    )
    for site, total in sorted(totals.items()):
        table.add_row(
            Text(plain(site)),
            f"{total.done}/{total.asked}",
            count_text(total.examples),
            count_text(total.tokens),
            metric_text(total.losses.get(Work.WORK_TRAIN)),
            metric_text(total.losses.get(Work.WORK_EVALUATE)),
            bytes_text(total.bytes_down),
            bytes_text(total.bytes_up),
            seconds_text(total.train_s),
        )
    return table


def troubles_table(rounds: Iterable[Round]) -> Table | None:
    """Every failed round and every outcome that is neither "done" nor open, with its whole reason.

    None if there is nothing of that kind.
    """
    table = FittingTable(">round", "site", "work", "state", "why")
    for item in rounds:
        for work in item.sites:
            if work.state not in ("done", "open"):
                name, kind = Text(plain(work.site)), enum_word(Work.DESCRIPTOR, work.work)
                tried = _name(item.number, work.attempt)
                table.add_row(tried, name, kind, site_state(work), Text(plain(work.reason)))
        if item.reason:
            table.add_row(round_name(item), "", "", round_state(item), Text(plain(item.reason)))
    return table if table.row_count else None


def is_version(item: Round) -> bool:
    """Whether a round is a version of an asynchronous run's model."""
    return any(work.turn for work in item.sites)


def round_title(item: Round, attempt: int = 0) -> str:
    """What the round is called, with its number and the try, the latest if not given."""
    return f"{'version' if is_version(item) else 'round'} {_name(item.number, attempt or item.attempt)}"


def round_name(item: Round) -> str:
    """The round's number, with the try if it is not the first."""
    return _name(item.number, item.attempt)


def _name(number: int, attempt: int) -> str:
    return f"{number}" if attempt < 2 else f"{number} (try {attempt})"


def round_state(item: Round) -> Text:
    """The round's state as a coloured word."""
    return Text(enum_word(RoundState.DESCRIPTOR, item.state), style=ROUND_STYLE.get(item.state, ""))


def site_state(work: SiteRound) -> Text:
    """The state of a site's work as a coloured word."""
    if work.is_late:
        return Text("late", style="yellow")
    return Text(plain(work.state), style=SITE_STYLE.get(work.state, TROUBLE_STYLE))


@dataclass
class _Totals:
    """What one site did so far."""

    asked: int = 0
    done: int = 0
    examples: int = 0
    tokens: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    train_s: float = 0.0
    losses: dict[int, float] = field(default_factory=dict)

    def add(self, work: SiteRound) -> None:
        self.bytes_down += work.bytes_down
        self.bytes_up += work.bytes_up
        if "loss" in work.metrics:
            self.losses[work.work] = work.metrics["loss"]
        # What a training alone measures before it begins is the initial model.
        if work.work == Work.WORK_TRAIN and "loss" in work.before.metrics:
            self.losses[Work.WORK_EVALUATE] = work.before.metrics["loss"]
        if work.work != Work.WORK_TRAIN:
            return
        self.asked += 1
        self.train_s += work.phase_seconds.get("train", 0.0)
        if work.state == "done":
            self.done += 1
            self.examples += work.examples
            self.tokens += work.tokens


def _main_work(item: Round) -> list[SiteRound]:
    """Each site's training in the round's present try; in round 0, which only measures, its evaluation.

    A version may have several updates of the same site.
    """
    wanted = Work.WORK_TRAIN if item.number else Work.WORK_EVALUATE
    return [work for work in item.sites if work.work == wanted and work.attempt == item.attempt]


def _sites_done(item: Round) -> Text:
    works = _main_work(item)
    if not works:  # such as round 0 where those who train measure the initial model
        return Text("–")
    done = sum(map(_counts, works))
    lost = sum(work.state not in ("done", "open") for work in works)
    return Text(f"{done}/{len(works)}", style="yellow" if lost else "")


def _counts(work: SiteRound) -> bool:
    return work.state == "done" and not work.is_late  # a late update counts in the round that takes it


def _metric_names(rounds: Iterable[Round]) -> list[str]:
    found = {name for item in rounds for name in item.metrics}
    first = [f"{TRAIN_PREFIX}loss", "loss"] + ["perplexity"] * ("perplexity" in found)
    return first + sorted(found.difference(first))


def _metric(source: Round | SiteRound, name: str) -> Text:
    return Text(metric_text(source.metrics.get(name)))
