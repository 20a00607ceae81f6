"""The table and the plot of benchmarks/peers.py."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from measure import MB
from nulltraining import Case, Figures, size_text
from rich import box
from rich.table import Table
from tables import FLOOR, INK, caption, spread_text

OURS = "fedloom"
COLUMNS = (
    "", "seconds a round", "s to end of\nround 1", "server peak\nMB (models)", "site peak\nMB",
    "CPU s a round:\nserver / sites", "times fedloom's:\nround / round 1", "server / site\nmemory", "CPU",
    "others'\ncores",
)  # fmt: skip
WIDTH = 160
NOTE_CHARACTERS = 400
SMALLEST_S = 0.1
FAILED = "#b03030"
SHADES = (INK, FLOOR, "#d98e32", "#6f9f5a")
PANELS: dict[str, Callable[[Figures], float]] = {
    "Seconds a round": lambda figures: figures.round_s.median if figures.round_s else figures.first_round_s,
    "Server's peak memory, MB": lambda figures: figures.server_peak_bytes / MB,
    "CPU seconds a round, all processes": lambda figures: figures.cpu_s,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one case of one system."""

    system: str
    case: Case
    figures: Figures | None = None
    failure: str | None = None
    """Why there are no figures."""


def ratios(theirs: Figures, ours: Figures) -> dict[str, float]:
    """A peer's figures by fedloom's: above 1 is where fedloom is quicker or takes less."""
    pairs = {
        "first_round": (theirs.first_round_s, ours.first_round_s),
        "server_memory": (theirs.server_peak_bytes, ours.server_peak_bytes),
        "client_memory": (theirs.client_peak_bytes, ours.client_peak_bytes),
        "cpu": (theirs.cpu_s, ours.cpu_s),
    }
    if theirs.round_s is not None and ours.round_s is not None:
        pairs["round"] = (theirs.round_s.median, ours.round_s.median)
    return {name: their / our for name, (their, our) in pairs.items() if our}


def as_data(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as JSON has them."""
    cases = []
    for case, members in _by_case(outcomes):
        ours = _ours(members)
        cases.append(
            {
                "model_bytes": case.model_bytes,
                "sites": case.sites,
                "rounds": case.rounds,
                "systems": [
                    {
                        "system": outcome.system,
                        "failure": outcome.failure,
                        "figures": asdict(outcome.figures) if outcome.figures else None,
                        "times_fedloom": ratios(outcome.figures, ours) if outcome.figures and ours else None,
                    }
                    for outcome in members
                ],
            }
        )
    return cases


def table(outcomes: Sequence[Outcome], machine: dict[str, Any]) -> Table:
    """One table: for each case the systems below each other."""
    made = Table(
        title="Null-training rounds beside the peers: medians (smallest-largest)",
        caption=caption(machine),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for number, name in enumerate(COLUMNS):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    failures = [outcome for outcome in outcomes if outcome.failure]
    for case, members in _by_case(outcomes):
        made.add_row(f"[bold]{case.name} sites[/bold]")
        ours = _ours(members)
        for outcome in members:
            if outcome.figures is None:
                made.add_row(outcome.system, f"failed: note {failures.index(outcome) + 1}", style="dim")
            else:
                made.add_row(*_row(outcome.system, outcome.figures, ours))
        made.add_section()
    return made


def notes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Why cases failed, numbered as the table has them."""
    failures = [outcome for outcome in outcomes if outcome.failure]
    for number, outcome in enumerate(failures, start=1):
        reason = " ".join(str(outcome.failure).split())
        if len(reason) > NOTE_CHARACTERS:  # a log's end tells most
            reason = f"{reason[: NOTE_CHARACTERS // 4]} ... {reason[-3 * NOTE_CHARACTERS // 4 :]}"
        yield f"note {number}: {outcome.system}, {outcome.case.name}: {reason}"


def save_plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Time, the server's memory and CPU time, each case's systems side by side."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for panel, (title, value) in zip(panels, PANELS.items(), strict=True):
        _bars(panel, outcomes, value)
        panel.set_title(title)
    for panel in (panels[0], panels[2]):
        # A bar begins at nothing, and still a hundredfold is seen.
        panel.set_yscale("symlog", linthresh=SMALLEST_S)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_ylim(bottom=0, top=panel.get_ylim()[1] * 2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _by_case(outcomes: Sequence[Outcome]) -> Iterator[tuple[Case, list[Outcome]]]:
    for case, members in groupby(outcomes, key=lambda outcome: outcome.case):
        yield case, list(members)


def _ours(members: Sequence[Outcome]) -> Figures | None:
    return next((outcome.figures for outcome in members if outcome.system == OURS), None)


def _row(system: str, figures: Figures, ours: Figures | None) -> list[str]:
    times = ratios(figures, ours) if ours is not None and system != OURS else {}

    def together(*names: str) -> str:
        return " / ".join(f"{times[name]:.1f}" for name in names if name in times)

    return [
        system,
        spread_text(figures.round_s),
        f"{figures.first_round_s:.1f}",
        f"{figures.server_peak_bytes / MB:.0f} ({figures.server_peak_bytes / figures.model_bytes:.1f})",
        f"{figures.client_peak_bytes / MB:.0f}",
        f"{figures.server_cpu_s:.2f} / {figures.client_cpu_s:.2f}",
        together("round", "first_round"),
        together("server_memory", "client_memory"),
        together("cpu"),
        f"{figures.others_cores:.1f}",
    ]


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}"


def _bars(panel: Any, outcomes: Sequence[Outcome], value: Callable[[Figures], float]) -> None:
    cases = [case for case, _ in _by_case(outcomes)]
    systems = list(dict.fromkeys(outcome.system for outcome in outcomes))
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        shift = (number - (len(systems) - 1) / 2) * width
        members = {cases.index(o.case): o.figures for o in outcomes if o.system == system}
        done = {place: value(figures) for place, figures in members.items() if figures is not None}
        places = [place + shift for place in done]
        bars = panel.bar(places, list(done.values()), width * 0.95, color=SHADES[number], label=system)
        panel.bar_label(bars, [_short(height) for height in done.values()], fontsize=7, padding=1)
        for place in members.keys() - done.keys():
            panel.text(
                place + shift, 0.02, "failed", color=FAILED, fontsize=7, rotation=90, ha="center",
                va="bottom", transform=panel.get_xaxis_transform(),
            )  # fmt: skip
    panel.set_xticks(range(len(cases)), [f"{size_text(c.model_bytes)}\n{c.sites} sites" for c in cases])
    panel.spines[["top", "right"]].set_visible(False)
