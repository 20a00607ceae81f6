"""The board that ``fedloom run watch`` keeps: events fold into it, lines and a live display come out.

Events are idempotent and the latest wins, so the board outlives a lost
connection: the coordinator's next snapshot folds into what is there.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedloom.v1.runs_pb2 import Round, Run, RunState, SiteProgress, SiteRound, WatchEvent
from fedloom.v1.session_pb2 import Phase, Work
from fedloom_server.console.formats import (
    bytes_text,
    count_text,
    duration_text,
    enum_word,
    first_line,
    metric_text,
    plain,
)
from fedloom_server.console.round_views import (
    TROUBLE_STYLE,
    is_version,
    round_state,
    round_title,
    rounds_table,
    site_state,
)
from fedloom_server.console.run_views import RUN_STYLE, run_state

ENDED = (RunState.RUN_STATE_FINISHED, RunState.RUN_STATE_FAILED, RunState.RUN_STATE_STOPPED)
BYTE_PHASES = (Phase.PHASE_DOWNLOAD, Phase.PHASE_UPLOAD)
BAR_COLUMNS = 24
TROUBLES = 4  # latest ones on a live display
LINES_BESIDES = 11 + TROUBLES  # header, blank lines, table head, what was left out, cursor


@dataclass
class Board:
    """What is known of one run."""

    run: Run = field(default_factory=Run)
    rounds: dict[int, Round] = field(default_factory=dict)
    """By number; a round that is tried again takes the place of its last try."""
    progress: dict[str, SiteProgress] = field(default_factory=dict)
    """By site, of the latest round."""
    lost: str = ""
    """Why there is no connection; empty while there is one."""
    _told: set[tuple[str, str]] = field(default_factory=set)
    """Assignments whose end a line has told, and how they ended."""

    @property
    def ended(self) -> bool:
        """Whether the run will not change any more, unless somebody resumes it."""
        return self.run.state in ENDED

    def fold(self, event: WatchEvent) -> list[str]:
        """Take in an event; returns a line for each thing that is new to the eye."""
        match event.WhichOneof("kind"):
            case "run":
                return self._fold_run(event.run)
            case "round":
                return self._fold_round(event.round)
            case "site_progress":
                return self._fold_progress(event.site_progress)
        return []  # a kind of event that a later version of the contract added

    def render(self, *, height: int | None = None, now_s: float | None = None) -> RenderableType:
        """The board as it stands, cut to a terminal of ``height`` lines if given."""
        if not self.run.id:
            return Text("connecting …", style="dim")
        now_s = time.time() if now_s is None else now_s
        rounds = self.in_order()
        room = None if height is None else max(4, height - LINES_BESIDES)
        parts: list[RenderableType] = [_header(self.run, rounds, self.lost, now_s)]
        if rounds and not self.ended:
            works = _latest_works(rounds[-1])
            most = len(works) if room is None else room // 2
            parts += [Text(), _sites(rounds[-1], self.progress, works, most)]
            room = None if room is None else room - min(most, len(works))
        if rounds:
            shown = rounds if room is None else rounds[-room:]
            parts += [
                Text(),
                *_left_out(len(rounds) - len(shown), "earlier rounds"),
                rounds_table(shown, now_s, self.run),
            ]
        troubles = list(_troubles(rounds))
        if troubles:
            parts += [Text(), *(troubles if room is None else troubles[-TROUBLES:])]
        return Group(*parts)

    def in_order(self) -> list[Round]:
        """The rounds, first to last."""
        return [self.rounds[key] for key in sorted(self.rounds)]

    def _fold_run(self, run: Run) -> list[str]:
        before, self.run = self.run, run
        if (before.state, before.reason) == (run.state, run.reason):
            return []
        reason = f": {first_line(run.reason)}" if run.reason else ""
        return [f"run {plain(run.id)} is {run_state(run)}{reason}"]

    def _fold_round(self, item: Round) -> list[str]:
        before = self.rounds.get(item.number, Round())
        self.rounds[item.number] = item
        # counted, because a round that is tried again lists a site's work once for each try
        known = Counter((work.site, work.work, work.state) for work in before.sites)
        lines = []
        for work in item.sites:
            outcome = (work.site, work.work, work.state)
            is_told = (work.assignment_id, work.state) in self._told  # a version hands work on to the next
            if work.state != "open" and known[outcome] <= 0 and not is_told:
                lines.append(_outcome_line(item, work))
            known[outcome] -= 1
            if work.assignment_id:
                self._told.add((work.assignment_id, work.state))
        if (before.attempt, before.state) != (item.attempt, item.state):
            lines.append(_round_line(item))
        elif measured := {name: item.metrics[name] for name in item.metrics if name not in before.metrics}:
            lines.append(f"{round_title(item)} is measured: {_facts(measured)}")
        return lines

    def _fold_progress(self, event: SiteProgress) -> list[str]:
        before = self.progress.get(event.site, SiteProgress())
        self.progress[event.site] = event
        if _stage(event) == _stage(before):
            return []
        work = enum_word(Work.DESCRIPTOR, event.work)
        phase = "" if _phase(event) == work else f", {_phase(event)}"
        title = round_title(self.rounds.get(event.round, Round(number=event.round)))
        return [f"{title}  {plain(event.site)}: {work}{phase}"]


def _stage(event: SiteProgress) -> tuple[object, ...]:
    """Where a site is in its work, as far as a line of its own is worth."""
    return event.progress.assignment_id or event.round, event.work, event.progress.phase


def _round_line(item: Round) -> str:
    facts = [_facts(item.metrics)] if item.metrics else []
    if item.reason:
        facts.append(plain(first_line(item.reason)))
    return f"{round_title(item)} is {round_state(item)}" + (f": {', '.join(facts)}" if facts else "")


def _facts(metrics: Mapping[str, float]) -> str:
    return plain(", ".join(f"{name} {metric_text(value)}" for name, value in sorted(metrics.items())))


def _outcome_line(item: Round, work: SiteRound) -> str:
    facts = f"{count_text(work.examples)} examples"
    if "loss" in work.metrics:
        facts += f", loss {metric_text(work.metrics['loss'])}"
    if work.state != "done":
        facts = first_line(work.reason)
    name = enum_word(Work.DESCRIPTOR, work.work)
    title = round_title(item, work.attempt)
    return f"{title}  {plain(work.site)}: {name} {plain(work.state)}" + (f": {facts}" if facts else "")


def _header(run: Run, rounds: list[Round], lost: str, now_s: float) -> Panel:
    state = run_state(run)
    if run.reason:
        state.append(f"  {first_line(run.reason)}", style="default not bold")
    unit = "version" if any(map(is_version, rounds)) else "round"
    at = f"{unit} {rounds[-1].number if rounds else 0} of {run.rounds_total}"
    spent = duration_text(run.started_at_s, run.ended_at_s, now_s)
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    line.add_column(width=BAR_COLUMNS)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(state, at, _bar(run.rounds_done, max(1, run.rounds_total)), spent)
    body: list[RenderableType] = [line]
    if lost:
        body.append(Text(f"reconnecting: {first_line(lost)}", style="bold yellow"))
    title = Text.assemble((plain(run.name), "bold"), "  ", (plain(run.id), "dim"))
    style = "yellow" if lost else RUN_STYLE.get(run.state, "").replace("bold ", "")
    return Panel(Group(*body), title=title, title_align="left", border_style=style, box=box.ROUNDED)


def _latest_works(item: Round) -> list[SiteRound]:
    """What each site does in a round or did last, by site."""
    latest: dict[str, SiteRound] = {}
    for work in sorted(item.sites, key=lambda work: (work.state == "open", work.work)):
        latest[work.site] = work
    return [latest[site] for site in sorted(latest)]


def _sites(
    item: Round, progress: dict[str, SiteProgress], works: list[SiteRound], most: int
) -> RenderableType:
    """A line for each site, at most ``most``; where they are cut, those at work come first."""
    if len(works) > most:
        works = sorted(works, key=lambda work: work.state != "open")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(min_width=6, max_width=BAR_COLUMNS)  # the one that gives way on a narrow terminal
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    for work in works[:most]:
        table.add_row(Text(plain(work.site), style="bold"), *_site_cells(item, work, progress.get(work.site)))
    states = Counter(plain(work.state) for work in works[most:])
    rest = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return Group(table, Text(f"and {rest}", style="dim")) if rest else table


def _site_cells(item: Round, work: SiteRound, event: SiteProgress | None) -> list[RenderableType]:
    """Phase, bar, amount, loss and throughput."""
    loss = f"loss {metric_text(work.metrics['loss'])}" if "loss" in work.metrics else ""
    if work.state != "open":
        full = 1.0 if work.state == "done" else 0.0
        amount = f"{count_text(work.examples)} examples" if work.state == "done" else ""
        return [site_state(work), _bar(full, 1.0), amount, loss, ""]
    if event is None or not _tells_of(event, item, work):
        return [Text("assigned", style="dim"), _bar(0, 1), "", "", ""]
    now = event.progress
    loss = f"loss {metric_text(now.loss)}" if now.HasField("loss") else ""
    speed = f"{count_text(now.tokens_per_s)} tok/s" if now.HasField("tokens_per_s") else ""
    return [Text(_phase(event), style="cyan"), _bar(now.done, now.total), _amount(event), loss, speed]


def _tells_of(event: SiteProgress, item: Round, work: SiteRound) -> bool:
    if work.assignment_id:
        return event.progress.assignment_id == work.assignment_id
    return (event.round, event.work) == (item.number, work.work)


def _bar(done: float, total: float) -> ProgressBar:
    if not total:
        return ProgressBar(total=None, pulse=True)
    return ProgressBar(total=total, completed=min(done, total), complete_style="cyan")


def _amount(event: SiteProgress) -> str:
    now = event.progress
    shown = bytes_text if now.phase in BYTE_PHASES else count_text
    if not now.total:
        return shown(now.done) if now.done else ""
    return f"{shown(now.done)} / {shown(now.total)}"


def _phase(event: SiteProgress) -> str:
    return enum_word(Phase.DESCRIPTOR, event.progress.phase)


def _troubles(rounds: list[Round]) -> Iterator[Text]:
    for item in rounds:
        lost = [work for work in item.sites if work.state not in ("open", "done")]
        lines = [
            f"{round_title(item, work.attempt)}  {plain(work.site)} {plain(work.state)}: "
            f"{first_line(work.reason)}"
            for work in lost
        ]
        if item.reason:
            lines.append(f"{round_title(item)}  {round_state(item)}: {first_line(item.reason)}")
        for line in lines:
            yield Text(line, style=TROUBLE_STYLE, no_wrap=True, overflow="ellipsis")


def _left_out(count: int, what: str) -> list[Text]:
    return [Text(f"… {count} {what}", style="dim")] if count > 0 else []
